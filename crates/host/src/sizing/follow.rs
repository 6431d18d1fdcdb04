//! What of its range a compute gets, by what it does: up at once, down slowly. Only decides; see [`super`] for the
//! rest.

use std::time::{Duration, Instant};

use varve_api::size::{Between, CurrentLimits};

use crate::cgroup::Load;

/// Up when it stood still for a twentieth of the time, because its processors were used up, ...
const THROTTLED_PART: u128 = 20;
/// ... or used nine tenths of them.
const CPU_FULL: (u64, u64) = (9, 10);
/// Down when it needs less than the limit for so long, and by so much in each further step.
const CPU_CALM: Duration = Duration::from_secs(10);
const CPU_STEP: u64 = 4;
/// Up when three quarters of the memory hold what cannot be thrown away, ...
const MEMORY_FULL: (u64, u64) = (3, 4);
/// ... or so many pages a second come back that were thrown away a moment ago.
const REFAULTS_MAX: u64 = 1024;
/// As above. Each time that it was too little, the next step down waits for twice as long.
const MEMORY_CALM: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(900));
const MEMORY_STEP: u64 = 8;
/// Between two steps down.
const STEP_WAIT: Duration = Duration::from_secs(5);

/// A limit that moves within a range.
#[derive(Clone, Copy, Debug)]
struct Moving {
    range: Between,
    limit: u64,
    /// Not to go down before.
    down_at: Instant,
    /// The most that was needed since the last step.
    needed: u64,
    calm: Duration,
}

impl Moving {
    fn new(range: Between, now: Instant, calm: Duration) -> Moving {
        Moving { range, limit: range.max, down_at: now + calm, needed: 0, calm }
    }

    fn up(&mut self, now: Instant) {
        self.limit = self.range.max;
        (self.down_at, self.needed) = (now + self.calm, 0);
    }

    /// Goes down a step if it is time, to what was needed at the least.
    fn down(&mut self, needed: u64, step: u64, now: Instant) {
        self.needed = self.needed.max(needed);
        if now >= self.down_at {
            let floor = self.needed.clamp(self.range.min, self.range.max);
            self.limit = (self.limit - self.limit / step).max(floor).min(self.limit);
            (self.down_at, self.needed) = (now + STEP_WAIT, 0);
        }
    }
}

/// See the module's doc.
#[derive(Debug)]
pub(super) struct Follower {
    cpu: Option<Moving>,
    memory: Option<Moving>,
    before: Option<(Instant, Load)>,
}

impl Follower {
    /// Of these ranges; begins with the most of both.
    pub(super) fn new(cpu: Option<Between>, memory: Option<Between>, now: Instant) -> Follower {
        let moving = |range: Option<Between>, calm| range.map(|range| Moving::new(range, now, calm));
        Follower { cpu: moving(cpu, CPU_CALM), memory: moving(memory, MEMORY_CALM.0), before: None }
    }

    /// The limits as they should be now.
    pub(super) fn limits(&self) -> CurrentLimits {
        CurrentLimits { cpu_milli: self.cpu.map(|moving| moving.limit), memory_bytes: self.memory.map(|moving| moving.limit) }
    }

    /// Whether a limit can move, or could not be brought down to its range yet.
    pub(super) fn moves(&self) -> bool {
        let moves = |moving: Moving| moving.range.min < moving.range.max || moving.limit > moving.range.max;
        [self.cpu, self.memory].into_iter().flatten().any(moves)
    }

    /// The most memory that it may have.
    pub(super) fn memory_max(&self) -> Option<u64> {
        self.memory.map(|moving| moving.range.max)
    }

    /// The memory was not enough.
    pub(super) fn is_out_of_memory(&mut self, now: Instant) {
        if let Some(memory) = &mut self.memory {
            memory.calm = (memory.calm * 2).min(MEMORY_CALM.1);
            memory.up(now);
        }
    }

    /// A limit of memory that the kernel could not keep to stays as it was.
    pub(super) fn keep_memory(&mut self, limit: Option<u64>) {
        if let (Some(memory), Some(limit)) = (&mut self.memory, limit) {
            memory.limit = limit;
        }
    }

    /// Takes in how it was since the last time.
    pub(super) fn follow(&mut self, load: Load, now: Instant) {
        let Some((then, before)) = self.before.replace((now, load)) else { return };
        let elapsed = now.saturating_duration_since(then);
        if elapsed.is_zero() {
            return;
        }
        let per_second = |count: u64| u64::try_from(u128::from(count) * 1_000_000_000 / elapsed.as_nanos()).unwrap_or(u64::MAX);
        if let Some(cpu) = &mut self.cpu {
            let used_milli = per_second(load.cpu_ns.saturating_sub(before.cpu_ns)) / 1_000_000;
            let throttled = load.throttled_ns.saturating_sub(before.throttled_ns);
            let is_full = used_milli * CPU_FULL.1 >= cpu.limit * CPU_FULL.0;
            if u128::from(throttled) * THROTTLED_PART >= elapsed.as_nanos() || is_full {
                cpu.up(now);
            } else {
                cpu.down(used_milli * 3 / 2, CPU_STEP, now);
            }
        }
        let refaults = per_second(load.refaults.saturating_sub(before.refaults));
        let is_full = |memory: &Moving| load.held_bytes.saturating_mul(MEMORY_FULL.1) >= memory.limit.saturating_mul(MEMORY_FULL.0);
        if let Some(memory) = &mut self.memory {
            if memory.limit > memory.range.max {
                memory.up(now);
            } else if memory.limit < memory.range.max && (is_full(memory) || refaults > REFAULTS_MAX) {
                self.is_out_of_memory(now);
            } else if is_full(memory) || refaults > REFAULTS_MAX {
                memory.up(now);
            } else {
                memory.down(load.held_bytes / 2 * 3, MEMORY_STEP, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;
    const LOOKED: Duration = Duration::from_secs(1);

    /// A follower that is told once a second.
    struct Seconds {
        follower: Follower,
        now: Instant,
        load: Load,
    }

    impl Seconds {
        fn new(cpu: (u64, u64), memory: (u64, u64)) -> Seconds {
            let (now, between) = (Instant::now(), |(min, max)| Some(Between { min, max }));
            let mut follower = Follower::new(between(cpu), between(memory), now);
            follower.follow(Load::default(), now);
            Seconds { follower, now, load: Load::default() }
        }

        /// So many seconds with so much use and throttling of processors, held memory and refaults.
        fn pass(&mut self, seconds: u64, used_milli: u64, throttled_ms: u64, held_bytes: u64, refaults: u64) -> CurrentLimits {
            for _ in 0..seconds {
                self.now += Duration::from_secs(1);
                self.load.cpu_ns += used_milli * 1_000_000;
                self.load.throttled_ns += throttled_ms * 1_000_000;
                self.load.refaults += refaults;
                self.load.held_bytes = held_bytes;
                self.follower.follow(self.load, self.now);
            }
            self.follower.limits()
        }
    }

    #[test]
    fn processors_go_down_slowly_and_up_at_once() {
        let mut seconds = Seconds::new((250, 2000), (256 * MB, 256 * MB));
        assert_eq!(seconds.pass(5, 10, 0, MB, 0).cpu_milli, Some(2000), "not yet");
        let soon = seconds.pass(10, 10, 0, MB, 0).cpu_milli.unwrap();
        assert!((1000..2000).contains(&soon), "slowly: {soon}");
        assert_eq!(seconds.pass(60, 10, 0, MB, 0).cpu_milli, Some(250), "no further than the least");
        assert_eq!(seconds.pass(1, 240, 600, MB, 0).cpu_milli, Some(2000), "within one look");
        let half = seconds.pass(60, 600, 0, MB, 0).cpu_milli.unwrap();
        assert_eq!(half, 900, "with room above what it uses");
    }

    #[test]
    fn memory_follows_what_is_held_and_what_comes_back() {
        let mut seconds = Seconds::new((1000, 1000), (256 * MB, 2048 * MB));
        assert_eq!(seconds.pass(120, 0, 0, 50 * MB, 0).memory_bytes, Some(256 * MB));
        assert_eq!(seconds.pass(1, 0, 0, 200 * MB, 0).memory_bytes, Some(2048 * MB), "held");
        assert_eq!(seconds.pass(30, 0, 0, 200 * MB, 0).memory_bytes, Some(2048 * MB), "it waits for longer");
        assert_eq!(seconds.pass(120, 0, 0, 200 * MB, 0).memory_bytes, Some(300 * MB), "not below what it holds");
        assert_eq!(seconds.pass(1, 0, 0, 200 * MB, 5000).memory_bytes, Some(2048 * MB), "pages come back");
        seconds.follower.keep_memory(Some(700 * MB));
        assert_eq!(seconds.follower.limits().memory_bytes, Some(700 * MB));
        seconds.follower.is_out_of_memory(seconds.now);
        assert_eq!(seconds.follower.limits().memory_bytes, Some(2048 * MB));
    }

    #[test]
    fn what_has_no_range_does_not_move() {
        let now = Instant::now();
        let fixed = Some(Between { min: 500, max: 500 });
        assert!(!Follower::new(fixed, None, now).moves());
        let mut above = Follower::new(None, fixed, now);
        above.keep_memory(Some(700));
        assert!(above.moves(), "it is tried again");
        above.follow(Load::default(), now);
        above.follow(Load::default(), now + LOOKED);
        assert_eq!((above.limits().memory_bytes, above.moves()), (Some(500), false));
        assert!(Follower::new(fixed, Some(Between { min: 1, max: 2 }), now).moves());
        assert_eq!(Follower::new(fixed, None, now).limits(), CurrentLimits { cpu_milli: Some(500), memory_bytes: None });
    }
}
