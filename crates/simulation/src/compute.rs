//! A compute's Postgres: it writes WAL on its branch's timeline, and waits for acknowledgements. Its process
//! ([`crate::process`]) begins and attaches it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use varve_postgres::Lsn;
use varve_storage::ids::{BranchName, TimelineId};

use crate::threads::Life;
use crate::wal::{BLOCKS, TUPLES_MAX, WalWriter};
use crate::world::World;

/// How long a session thinks between transactions.
const THINK_MAX: Duration = Duration::from_millis(120);

struct State {
    writer: WalWriter,
    acknowledged: Lsn,
    /// The machine whose server acknowledged last.
    acknowledged_by: usize,
    /// Whose acknowledgements count.
    standby_name: Option<String>,
    /// Tuples on each block.
    tuples: Vec<u16>,
    /// Whether it takes transactions.
    writes: bool,
}

/// See the module's doc.
pub struct Compute {
    /// The branch that it belongs to.
    pub branch: BranchName,
    /// The timeline that it was started on.
    pub timeline: TimelineId,
    /// Its writer epoch.
    pub epoch: u32,
    base: Lsn,
    state: Mutex<State>,
    news: Notify,
    acknowledged: Notify,
    life: Life,
}

/// What a compute starts with.
pub struct Begin {
    /// The branch that it belongs to.
    pub branch: BranchName,
    /// The timeline.
    pub timeline: TimelineId,
    /// Its TLI.
    pub tli: u32,
    /// Its writer epoch.
    pub epoch: u32,
    /// Where its data directory stands.
    pub base: Lsn,
    /// The standby that it waits for at first.
    pub standby_name: String,
}

impl Compute {
    /// Starts a compute, which writes until it is ended or fenced.
    pub fn start(world: &Arc<World>, begin: Begin) -> Arc<Compute> {
        let (prev, shown) = {
            let mut ledger = world.ledger.lock();
            (ledger.record_before(begin.timeline, begin.base), ledger.shown(begin.timeline, begin.base))
        };
        let tuples = world.check(shown).map_or_else(|| vec![0; BLOCKS as usize], |shown| shown.tuples());
        let compute = Arc::new(Compute {
            branch: begin.branch,
            timeline: begin.timeline,
            epoch: begin.epoch,
            base: begin.base,
            state: Mutex::new(State {
                writer: WalWriter::new(begin.base, prev, begin.tli),
                acknowledged: begin.base,
                acknowledged_by: 0,
                standby_name: Some(begin.standby_name),
                tuples,
                writes: true,
            }),
            news: Notify::new(),
            acknowledged: Notify::new(),
            life: Life::default(),
        });
        world.say(format_args!("{} starts at {}", compute.name(), begin.base));
        compute.write(world, |_, state| vec![state.writer.begin(world.next_xid())]);
        world.put_compute(&compute);
        compute.life.spawn(compute.clone().session(world.clone()));
        compute
    }

    /// For the trace.
    pub fn name(&self) -> String {
        format!("compute {} of {} epoch {}", self.branch, &self.timeline.to_string()[..6], self.epoch)
    }

    /// Whether it runs no more.
    pub fn is_over(&self) -> bool {
        self.life.is_over()
    }

    /// Ends it, as a kill does.
    pub fn kill(&self, world: &World, why: &str) {
        if !self.is_over() {
            world.say(format_args!("{} ends: {why}", self.name()));
            self.life.end();
            self.news.notify_waiters();
        }
    }

    fn write(&self, world: &World, make: impl FnOnce(&World, &mut State) -> Vec<crate::wal::Written>) -> Lsn {
        let end = {
            let mut state = self.state.lock();
            let mut ledger = world.ledger.lock();
            for record in make(world, &mut state) {
                ledger.wrote(self.timeline, self.epoch, record);
            }
            state.writer.end()
        };
        self.news.notify_waiters();
        end
    }

    /// One transaction, of some records; gives its end.
    fn transaction(&self, world: &World) -> Lsn {
        self.write(world, |world, state| {
            let xid = world.next_xid();
            let mut records = Vec::new();
            for _ in 0..=world.below(3) {
                let block = world.below(u64::from(BLOCKS)) as u32;
                let tuples = &mut state.tuples[block as usize];
                if *tuples > 0 && world.chance(80) {
                    *tuples = 0;
                    records.push(state.writer.image(block, world.below(256) as u8));
                }
                *tuples = if *tuples >= TUPLES_MAX { 1 } else { *tuples + 1 };
                let marker = u128::from(world.next_marker()).to_le_bytes();
                records.push(state.writer.insert(xid, block, *tuples, marker));
            }
            records.push(state.writer.end_transaction(xid, !world.chance(150), world.wall_clock().0));
            records
        })
    }

    /// Writes, and waits until it is acknowledged.
    async fn session(self: Arc<Self>, world: Arc<World>) {
        loop {
            world.pause(THINK_MAX).await;
            if world.quiet.load(std::sync::atomic::Ordering::SeqCst) {
                return;
            }
            if self.state.lock().writes {
                self.commit(&world).await;
            }
        }
    }

    /// Some transactions at once, and then until the last is acknowledged.
    pub async fn commit(&self, world: &World) {
        let submitted = tokio::time::Instant::now();
        let mut end = Lsn::INVALID;
        for _ in 0..=world.below(3) {
            end = self.transaction(world);
        }
        self.wait_acknowledged(end).await;
        let machine = self.state.lock().acknowledged_by;
        world.check_serves(machine, &self.branch, self.timeline, submitted);
    }

    async fn wait_acknowledged(&self, end: Lsn) {
        loop {
            let acknowledged = self.acknowledged.notified();
            if self.state.lock().acknowledged >= end {
                return;
            }
            acknowledged.await;
        }
    }

    /// What its walsender sends from `from` on; `None` when it has no such WAL, or is gone.
    pub async fn read(&self, from: Lsn, max: usize) -> Option<Bytes> {
        loop {
            let news = self.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if self.is_over() {
                return None;
            }
            let bytes = self.state.lock().writer.bytes(from, max)?;
            if !bytes.is_empty() {
                return Some(bytes);
            }
            news.await;
        }
    }

    /// The standby `name`, a machine's server, has everything up to `lsn`.
    pub fn acknowledge(&self, world: &World, machine: usize, name: &str, lsn: Lsn) {
        let from = {
            let mut state = self.state.lock();
            if self.is_over() || state.standby_name.as_deref() != Some(name) || lsn <= state.acknowledged {
                return;
            }
            state.acknowledged_by = machine;
            std::mem::replace(&mut state.acknowledged, lsn)
        };
        world.say(format_args!("{} has {lsn} acknowledged", self.name()));
        let result = world.ledger.lock().acknowledged(self.timeline, self.epoch, from, lsn);
        world.check(result);
        self.acknowledged.notify_waiters();
    }

    /// Up to where its WAL is flushed, and whose acknowledgements count.
    pub fn flushed(&self) -> (Lsn, Option<String>) {
        let state = self.state.lock();
        (state.writer.end(), state.standby_name.clone())
    }

    /// Whose acknowledgements count from now on.
    pub fn wait_for_standby(&self, name: Option<String>) {
        self.state.lock().standby_name = name;
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        self.life.ended().await;
    }

    /// How far it has written and is acknowledged, and for whom it waits.
    pub fn progress(&self) -> String {
        let state = self.state.lock();
        format!("written {}, acknowledged {}, waits for {:?}", state.writer.end(), state.acknowledged, state.standby_name)
    }

    /// Where its data directory began.
    pub fn base(&self) -> Lsn {
        self.base
    }

    /// A clean stop: no more transactions, and all WAL is durable at its server. Whether that came about in time.
    pub async fn shut_down(&self, limit: Duration) -> bool {
        let end = {
            let mut state = self.state.lock();
            state.writes = false;
            state.writer.end()
        };
        tokio::time::timeout(limit, self.wait_acknowledged(end)).await.is_ok()
    }
}
