//! A compute process on a host: it begins, runs one Postgres after another ([`Compute`]), attaches, follows orders and
//! tells its end, by the same calls and in the same order as the real one (`varve_host::process`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use varve_api::host::{Attach, Begin, BeginRequest, Desired, Ended, Orders, OrdersQuery, Walsender};
use varve_api::kept_pages::KeptPages;
use varve_api::{Code, Refusal};
use varve_postgres::Lsn;
use varve_storage::ids::TimelineId;

use crate::compute::{self, Compute};
use crate::host::Host;
use crate::kinds::Kind;
use crate::network::{About, PLAIN, call};
use crate::threads::Life;
use crate::world::{Plant, World};

/// Wait between tries to reach a server that is away, and after a Postgres that failed.
const RETRY_WAIT: Duration = Duration::from_millis(100);
/// How long Postgres takes to start.
const START_MAX: Duration = Duration::from_millis(300);
/// How long a clean stop waits until everything is durable.
const SHUT_DOWN_MAX: Duration = Duration::from_secs(20);
/// How long the server may take until it takes the end of a compute.
const END_MAX: Duration = Duration::from_secs(60);

/// See the module's doc.
pub struct Process {
    /// The endpoint.
    pub id: String,
    host: Arc<Host>,
    life: Life,
    postgres: Mutex<Option<Arc<Compute>>>,
    /// Planted: it goes on with what it runs, whatever it is told.
    deaf: AtomicBool,
}

enum End {
    Stopped { clean: bool, reason: &'static str },
    Replaced,
    Failed,
}

fn is_unwanted(refusal: &Refusal) -> bool {
    matches!(refusal.code, Code::UnknownCompute | Code::NotOwner | Code::Fenced)
}

fn is_transient(refusal: &Refusal) -> bool {
    refusal.code == Code::Unavailable
}

impl Process {
    /// Starts it.
    pub fn start(world: &Arc<World>, host: &Arc<Host>, id: &str) -> Arc<Process> {
        let process = Arc::new(Process {
            id: id.to_owned(),
            host: host.clone(),
            life: Life::default(),
            postgres: Mutex::default(),
            deaf: AtomicBool::new(false),
        });
        let (me, world) = (process.clone(), world.clone());
        process.life.spawn(async move {
            me.run(&world).await;
            me.kill(&world, "its process ends");
        });
        process
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.life.is_over()
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        self.life.ended().await;
    }

    /// Ends it, and its Postgres with it.
    pub fn kill(&self, world: &World, why: &str) {
        if let Some(postgres) = self.postgres.lock().take() {
            postgres.kill(world, why);
        }
        self.life.end();
    }

    /// Whether it is the process of this Postgres.
    pub fn runs(&self, postgres: &Arc<Compute>) -> bool {
        self.postgres.lock().as_ref().is_some_and(|mine| Arc::ptr_eq(mine, postgres))
    }

    /// Planted: whether it does not hear.
    pub fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::SeqCst)
    }

    fn about(&self, crash: Option<Kind>) -> About {
        About { crash, slow: self.host.slow(), ..PLAIN }
    }

    async fn run(&self, world: &Arc<World>) {
        loop {
            let Some(begin) = self.begin(world).await else { return };
            world.pause(START_MAX).await;
            let Some(postgres) = self.postgres(world, &begin).await else {
                tokio::time::sleep(RETRY_WAIT).await;
                continue;
            };
            match self.serve(world, &begin, &postgres).await {
                End::Stopped { clean, reason } => {
                    let clean = clean && postgres.shut_down(SHUT_DOWN_MAX).await;
                    postgres.kill(world, reason);
                    // Its last record is the checkpoint.
                    let checkpoint = clean.then(|| Lsn(postgres.flushed().0.0 - 1));
                    return self.tell_end(world, &begin, checkpoint, reason).await;
                }
                End::Replaced => postgres.kill(world, "another incarnation is wanted"),
                End::Failed => {
                    postgres.kill(world, "it failed");
                    tokio::time::sleep(RETRY_WAIT).await;
                }
            }
        }
    }

    /// Begins, waiting as long as the server is away; nothing when it is not wanted.
    async fn begin(&self, world: &Arc<World>) -> Option<Begin> {
        loop {
            let (id, host) = (self.id.clone(), self.host.id.to_string());
            let request = BeginRequest { host: Some(host) };
            let begun = call(world, self.about(Some(Kind::CrashInBegin)), |plane| async move { plane.begin(&id, &request).await });
            match begun.await {
                Ok(begin) => return Some(begin),
                Err(refusal) if is_transient(&refusal) => {}
                Err(refusal) if refusal.code == Code::Fenced => match self.orders(world, 0, "").await {
                    Ok(Orders { desired: Desired::Run, .. }) => {}
                    Ok(_) => return None,
                    Err(refusal) if is_transient(&refusal) => {}
                    Err(_) => return None,
                },
                Err(refusal) => {
                    world.say(format_args!("process {} cannot begin: {refusal}", &self.id[..6]));
                    return None;
                }
            }
            tokio::time::sleep(RETRY_WAIT).await;
        }
    }

    /// Starts Postgres at the base that the server named; nothing when its timeline is gone by now.
    async fn postgres(&self, world: &Arc<World>, begin: &Begin) -> Option<Arc<Compute>> {
        let timeline: TimelineId = begin.timeline_id.parse().ok()?;
        let tli = world.learn().await.timeline(timeline).ok()?.facts.tli;
        let postgres = Compute::start(
            world,
            compute::Begin {
                branch: begin.branch.parse().ok()?,
                timeline,
                tli,
                epoch: begin.epoch?,
                base: begin.base_lsn.parse().ok()?,
                standby_name: begin.standby_name.clone()?,
            },
        );
        *self.postgres.lock() = Some(postgres.clone());
        Some(postgres)
    }

    async fn orders(&self, world: &Arc<World>, incarnation: u64, server_run: &str) -> Result<Orders, Refusal> {
        let (id, query) = (self.id.clone(), OrdersQuery { incarnation, server_run: server_run.to_owned(), size: None, check: None });
        call(world, self.about(None), |plane| async move { plane.orders(&id, &query).await }).await
    }

    async fn serve(&self, world: &Arc<World>, begin: &Begin, postgres: &Arc<Compute>) -> End {
        let socket = world.open_walsender(postgres);
        let end = self.serve_at(world, begin, postgres, &socket).await;
        world.close_walsender(&socket);
        end
    }

    async fn serve_at(&self, world: &Arc<World>, begin: &Begin, postgres: &Arc<Compute>, socket: &str) -> End {
        let (mut server_run, mut incarnation) = (String::new(), begin.incarnation);
        loop {
            let answer = tokio::select! {
                biased;
                () = postgres.ended() => return End::Failed,
                answer = self.orders(world, incarnation, &server_run) => answer,
            };
            match answer {
                Ok(Orders { desired: Desired::Stop, .. }) => return End::Stopped { clean: true, reason: "stopped" },
                Ok(Orders { desired: Desired::Fenced, .. }) => return End::Stopped { clean: false, reason: "fenced" },
                Ok(orders) if orders.incarnation > incarnation => {
                    if world.plant == Plant::HostRecordAfterCommit && world.chance(600) {
                        // The old order: which timeline it serves stood in a file of the host, too, and writing that
                        // one failed.
                        self.deaf.store(true, Ordering::SeqCst);
                        incarnation = orders.incarnation;
                        continue;
                    }
                    return End::Replaced;
                }
                Ok(orders) if orders.server_run != server_run => {
                    // First where WAL is flushed to, then the server, then the standby's name.
                    let (flushed, waits_for) = postgres.flushed();
                    let attach = Attach {
                        timeline_id: begin.timeline_id.clone(),
                        epoch: begin.epoch,
                        incarnation,
                        pid: 1,
                        mount_pid: 1,
                        walsender: Walsender { socket: socket.to_owned(), credential: String::new() },
                        flushed: flushed.to_string(),
                        waits_for: waits_for.clone(),
                        warnings: Vec::new(),
                    };
                    let id = self.id.clone();
                    match call(world, self.about(Some(Kind::CrashInAttach)), |plane| async move { plane.attach(&id, attach).await }).await {
                        Ok(attached) => {
                            world.say(format_args!("{} is attached", postgres.name()));
                            if attached.standby_name == waits_for {
                                server_run = orders.server_run;
                            }
                            // Else it attaches once more: a former server may have acknowledged more by now.
                            postgres.wait_for_standby(attached.standby_name);
                        }
                        Err(refusal) if is_transient(&refusal) => tokio::time::sleep(RETRY_WAIT).await,
                        Err(refusal) if refusal.code == Code::Fenced => return End::Replaced,
                        Err(refusal) if refusal.code == Code::NotOwner => {
                            return End::Stopped { clean: false, reason: "another server owns the tenant" };
                        }
                        Err(refusal) => {
                            world.say(format_args!("{} is not taken: {refusal}", postgres.name()));
                            return End::Failed;
                        }
                    }
                }
                Ok(_) => {}
                Err(refusal) if is_transient(&refusal) => tokio::time::sleep(RETRY_WAIT).await,
                Err(_) => return End::Stopped { clean: false, reason: "the server does not know it" },
            }
        }
    }

    /// Tells how it ended; a clean end until it counts, or takes too long.
    async fn tell_end(&self, world: &Arc<World>, begin: &Begin, stopped: Option<Lsn>, reason: &str) {
        let checkpoint = stopped.map(|lsn| lsn.to_string());
        let mut ended = Ended {
            pages: KeptPages::default(),
            warnings: Vec::new(),
            incarnation: begin.incarnation,
            timeline_id: Some(begin.timeline_id.clone()),
            epoch: begin.epoch,
            clean: stopped.is_some(),
            checkpoint,
            reason: reason.to_owned(),
        };
        let deadline = Instant::now() + END_MAX;
        loop {
            let (id, told) = (self.id.clone(), ended.clone());
            let about = self.about(Some(Kind::CrashInStop));
            match call(world, about, |plane| async move { plane.ended(&id, &told).await }).await {
                Ok(()) => return,
                Err(refusal) if is_unwanted(&refusal) => return,
                Err(refusal) if is_transient(&refusal) && Instant::now() < deadline => tokio::time::sleep(RETRY_WAIT).await,
                Err(refusal) if ended.clean => ended = Ended { clean: false, reason: refusal.to_string(), ..ended },
                Err(_) => return,
            }
        }
    }
}
