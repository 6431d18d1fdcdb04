//! What a script's commands do: one tenant, machines, computes, and what a control plane does with the engine.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use varve_engine::resolve::{Moment, Resolved, resolve};
use varve_engine::timeline::{Flushed, StreamEnd};
use varve_engine::{EngineError, LiveTimeline, Tenant, moments};
use varve_postgres::{Lsn, Timestamp};
use varve_simulation::template;
use varve_simulation::threads::Pool;
use varve_simulation::wal::{BLOCKS, FIRST_XID, MAJOR, RELATION, START, SYSTEM_IDENTIFIER, WalWriter};
use varve_storage::edit_log::{self, EntryId, EntryKind};
use varve_storage::ids::{BranchName, TenantId, TimelineId};
use varve_storage::manifest::{ManifestState, timeline_folder};
use varve_storage::relation::{self, RelationError};
use varve_storage::tenant_log::{
    self, Ancestor, TenantEdit, TenantError, TenantFacts, TenantState, TimelineFacts, removed_timelines, tenant_folder,
};
use varve_testing::sim_store::SimStore;

use super::Command;
use super::compute::{Compute, Sent};
use super::server::{Machine, Process};
use super::words::Words;

/// What a command says, or why it could not be done.
pub(super) type Said<T> = Result<T, Box<dyn std::error::Error>>;

/// How long a read waits for its position.
const READ_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long a look at the tail waits for what is on its way.
const TAIL_LOOK: Duration = Duration::from_millis(100);
/// A timeline that nobody uses for so long is closed.
const UNUSED_MAX: Duration = Duration::from_secs(30);
/// Second 0 of a script's wall clock.
const EPOCH_US: i64 = 700_000_000_000_000;

/// See the module's doc.
pub(super) struct World {
    pub(super) words: Words,
    pool: Arc<Pool>,
    store: SimStore,
    tenant: TenantId,
    machines: BTreeMap<usize, Machine>,
    /// The server that is asked.
    active: usize,
    computes: Vec<Compute>,
    started: usize,
    transactions: u32,
    second: i64,
    shown: BTreeSet<EntryId>,
}

fn name(text: &str) -> Said<BranchName> {
    Ok(text.parse()?)
}

fn timestamp(second: i64) -> Timestamp {
    Timestamp(EPOCH_US + second * 1_000_000)
}

fn moment(at: Option<u64>, second: Option<i64>) -> Moment {
    match (at, second) {
        (Some(at), _) => Moment::Lsn(START + at),
        (None, Some(second)) => Moment::Time(timestamp(second)),
        (None, None) => Moment::Head,
    }
}

impl World {
    /// Nothing but the template.
    pub(super) fn new(pool: Arc<Pool>) -> anyhow::Result<World> {
        let store = SimStore::new();
        template::put_into(&store);
        let tenant = TenantId::random()?;
        let mut words = Words::default();
        words.call(&tenant, "acme");
        Ok(World {
            words,
            pool,
            store,
            tenant,
            machines: BTreeMap::new(),
            active: 1,
            computes: Vec::new(),
            started: 0,
            transactions: 0,
            second: 0,
            shown: BTreeSet::new(),
        })
    }

    /// Ends all processes; how much work has panicked.
    pub(super) async fn end(&mut self) -> u64 {
        for machine in self.machines.values_mut() {
            machine.end().await;
        }
        self.pool.panics()
    }

    /// Does what a command says.
    pub(super) async fn run(&mut self, command: &Command) -> Said<String> {
        match command {
            Command::Tenant => self.make_tenant().await,
            Command::Open(server) => self.open(*server).await,
            Command::Crash(server, how) => {
                self.machine(*server)?.crash(*how).await?;
                Ok(format!("server {server} is gone"))
            }
            Command::Takeover(server) => self.take_over(*server).await,
            Command::Look(server) => self.look(*server).await,
            Command::Begin(branch) => self.begin(branch).await,
            Command::Attach(compute, server) => self.attach(compute, server.unwrap_or(self.active)).await,
            Command::Write { on, page, value, second, sent } => self.write(on, *page, value, *second, *sent).await,
            Command::Stop(compute) => self.stop(compute).await,
            Command::Kill(compute) => {
                let at = self.compute_at(compute)?;
                Ok(format!("{} is gone", self.computes.remove(at).name))
            }
            Command::Branch { name, from, at, second } => self.branch(name, from, moment(*at, *second)).await,
            Command::Restore { branch, before, at, second } => self.restore(branch, before, moment(*at, *second)).await,
            Command::Delete(branch) => self.delete(branch).await,
            Command::Read { branch, page, at, server } => {
                self.read(branch, *page, at.map(|at| START + at), server.unwrap_or(self.active)).await
            }
            Command::Flush(branch, server) => {
                let live = self.live_on(server.unwrap_or(self.active), branch).await?;
                live.flush_all().await?;
                Ok(format!("layers have {} up to {}", live.id(), live.positions().layered()))
            }
            Command::Merge(branch) => self.merge(branch).await,
            Command::Positions(branch) => self.positions(branch).await,
            Command::Layers(branch) => self.layers(branch).await,
            Command::Branches => Ok(branches(&*self.state().await?)),
            Command::Log => self.log().await,
            Command::Idle(seconds) => self.idle(*seconds).await,
            Command::Opened => Ok(opened(self.process(self.active)?)),
        }
    }

    fn machine(&mut self, server: usize) -> Said<&mut Machine> {
        Ok(self.machines.get_mut(&server).ok_or_else(|| format!("there is no server {server}"))?)
    }

    fn process(&self, server: usize) -> Said<&Arc<Process>> {
        self.machines.get(&server).ok_or_else(|| format!("there is no server {server}"))?.process()
    }

    async fn open(&mut self, server: usize) -> Said<String> {
        let (pool, store) = (self.pool.clone(), self.store.clone());
        let machine = match self.machines.entry(server) {
            std::collections::btree_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => place.insert(Machine::new(server)?),
        };
        machine.start(&pool, &store).await?;
        let wal_log = machine.wal_log();
        self.words.call(&wal_log, &format!("the WAL log of server {server}"));
        Ok(format!("server {server} runs"))
    }

    async fn make_tenant(&mut self) -> Said<String> {
        let facts = TenantFacts {
            id: self.tenant,
            name: "acme".parse()?,
            pg_version: MAJOR.number(),
            system_identifier: SYSTEM_IDENTIFIER,
            created: 0,
            template: template::NAME.to_owned(),
            password: String::new(),
            password_verifier: String::new(),
        };
        let timeline = TimelineId::random()?;
        let first = TimelineFacts { id: timeline, ancestor: None, tli: 2, start: START, created: 0 };
        let edits = vec![TenantEdit::Timeline(first), TenantEdit::Branch { name: name("main")?, timeline }];
        self.open(1).await?;
        tenant_log::create_tenant(&self.process(1)?.context().store, facts, edits).await?;
        self.own(1).await?;
        self.log().await?;
        Ok(format!("main is {timeline}"))
    }

    /// The tenant on a server, which takes it over if it is the one that is asked.
    async fn own(&self, server: usize) -> Said<Arc<Tenant>> {
        let process = self.process(server)?;
        match process.owned() {
            Some(tenant) => Ok(tenant),
            None if server == self.active => Ok(process.take_over(self.tenant).await?),
            None => Err(EngineError::NotOwner { tenant: self.tenant }.into()),
        }
    }

    async fn take_over(&mut self, server: usize) -> Said<String> {
        if !self.machines.get(&server).is_some_and(Machine::runs) {
            self.open(server).await?;
        }
        self.active = server;
        let tenant = self.own(server).await?;
        Ok(format!("server {server} has acme in generation {}", tenant.log().ownership().generation))
    }

    async fn look(&mut self, server: usize) -> Said<String> {
        let process = self.process(server)?;
        let Some(tenant) = process.owned() else { return Ok(format!("server {server} does not have acme")) };
        let Err(error) = tenant.log().check_ownership().await else { return Ok(format!("server {server} has acme")) };
        process.context().lost.note(self.tenant, tenant.log().ownership().generation);
        while process.owned().is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(format!("server {server} has lost acme: {error}"))
    }

    /// A branch's timeline, opened on the server that is asked.
    async fn live(&self, branch: &str) -> Said<Arc<LiveTimeline>> {
        self.live_on(self.active, branch).await
    }

    async fn live_on(&self, server: usize, branch: &str) -> Said<Arc<LiveTimeline>> {
        let tenant = self.own(server).await?;
        let timeline = tenant.log().state().branch(branch)?.facts.id;
        Ok(tenant.timeline(timeline).await?)
    }

    /// Which compute is meant by its name, or by that of its branch: then the newest.
    fn compute_at(&self, named: &str) -> Said<usize> {
        let is_it = |compute: &Compute| compute.name == named || compute.branch.as_str() == named;
        Ok(self.computes.iter().rposition(is_it).ok_or_else(|| format!("no compute is, or belongs to, {named}"))?)
    }

    async fn begin(&mut self, branch: &str) -> Said<String> {
        let live = self.live(branch).await?;
        let tenant = self.own(self.active).await?;
        let start = live.begin_epoch(tenant.log(), &name(branch)?).await?;
        let (at, base, epoch) = (live.clone(), start.lsn, start.epoch);
        live.wait_applied(base, READ_WAIT_MAX).await?;
        let (prev, tuples) = live.threads().call(move || stands_at(&at, base)).await??;
        let mut writer = WalWriter::new(base, prev, live.facts().tli);
        writer.begin(FIRST_XID + self.transactions);
        self.started += 1;
        let compute = format!("c{}", self.started);
        self.computes.push(Compute::new(compute.clone(), name(branch)?, live.id(), start, writer, tuples));
        let attached = self.attach(&compute, self.active).await?;
        Ok(format!("{compute} starts on {} in epoch {epoch}, at {base}\n{attached}", live.id()))
    }

    async fn attach(&mut self, compute: &str, server: usize) -> Said<String> {
        let at = self.compute_at(compute)?;
        let tenant = self.own(server).await?;
        let process = self.process(server)?.clone();
        let compute = &mut self.computes[at];
        let live = tenant.timeline(compute.timeline).await?;
        let flushed = Flushed { lsn: compute.writer.end(), waits_for: None };
        let (stream, standby) = live.open_stream(tenant.log(), &compute.branch, compute.epoch, flushed, |_| {}).await?;
        let from = stream.start();
        compute.connect(server, &process, stream, standby.name);
        let acknowledged = compute.send(from, Sent::All).await?.acknowledged?;
        Ok(format!("{} sends to server {server} from {from} on, acknowledged up to {acknowledged}", compute.name))
    }

    async fn write(&mut self, on: &str, page: u32, value: &str, second: Option<i64>, sent: Sent) -> Said<String> {
        let at = self.compute_at(on)?;
        let xid = FIRST_XID + self.transactions;
        self.transactions += 1;
        self.second = second.unwrap_or(self.second + 1);
        let compute = &mut self.computes[at];
        let mut marker = [0; 16];
        marker.get_mut(..value.len()).ok_or("a value has at most 16 bytes")?.copy_from_slice(value.as_bytes());
        let tuples = compute.tuples.get_mut(page as usize).ok_or_else(|| format!("pages are 0 to {}", BLOCKS - 1))?;
        *tuples += 1;
        let from = compute.writer.end();
        compute.writer.insert(xid, page, *tuples, marker);
        compute.writer.end_transaction(xid, true, timestamp(self.second).0);
        let end = compute.writer.end();
        let taken = compute.send(from, sent).await?;
        let mut said = match taken.acknowledged {
            Ok(acknowledged) if acknowledged == end => format!("{} has {end} acknowledged", compute.name),
            Ok(acknowledged) => format!("{} wrote up to {end}, acknowledged up to {acknowledged}", compute.name),
            Err(reason) => format!("{} wrote up to {end}, not acknowledged: {reason}", compute.name),
        };
        for server in taken.also {
            write!(said, "; server {server} took it, too")?;
        }
        Ok(said)
    }

    async fn stop(&mut self, compute: &str) -> Said<String> {
        let at = self.compute_at(compute)?;
        let tenant = self.own(self.active).await?;
        let compute = &mut self.computes[at];
        let live = tenant.timeline(compute.timeline).await?;
        let checkpoint = Lsn(compute.writer.end().0 - 1);
        live.close_epoch(tenant.log(), compute.epoch, Some(checkpoint)).await?;
        compute.disconnect();
        Ok(format!("{} has stopped, and layers have {} up to {}", compute.name, live.id(), live.positions().layered()))
    }

    async fn new_timeline(&self, live: &Arc<LiveTimeline>, moment: Moment) -> Said<(Resolved, TimelineFacts)> {
        let at = resolve(live, moment).await?;
        let ancestor = Some(Ancestor { timeline: at.timeline, lsn: at.lsn });
        Ok((at, TimelineFacts { id: TimelineId::random()?, ancestor, tli: 0, start: at.lsn, created: 0 }))
    }

    async fn branch(&self, new: &str, from: &str, moment: Moment) -> Said<String> {
        let (new, live, tenant) = (name(new)?, self.live(from).await?, self.own(self.active).await?);
        let (at, facts) = self.new_timeline(&live, moment).await?;
        let timeline = facts.id;
        let plan = |state: &TenantState| {
            state.check_free(&new)?;
            let facts = TimelineFacts { tli: state.next_tli()?, ..facts };
            let edits = vec![TenantEdit::Timeline(facts), TenantEdit::Branch { name: new.clone(), timeline }];
            Ok::<_, TenantError>((edits, ()))
        };
        tenant.log().commit(plan).await.map_err(EngineError::from)?;
        Ok(format!("{new} is {timeline}, from {} at {}", at.timeline, at.lsn))
    }

    async fn restore(&self, branch: &str, before: &str, moment: Moment) -> Said<String> {
        let (before, live, tenant) = (name(before)?, self.live(branch).await?, self.own(self.active).await?);
        let (at, facts) = self.new_timeline(&live, moment).await?;
        let timeline = facts.id;
        let plan = |state: &TenantState| state.restore_branch(branch, &before, &facts).map(|edits| (edits, ()));
        tenant.log().commit(plan).await.map_err(EngineError::from)?;
        live.end_stream(StreamEnd::Ended).await?;
        Ok(format!("{branch} is {timeline}, from {} at {}; {} is {before}", at.timeline, at.lsn, live.id()))
    }

    async fn delete(&self, branch: &str) -> Said<String> {
        let tenant = self.own(self.active).await?;
        let timeline = tenant.log().state().branch(branch)?.facts.id;
        let plan = |state: &TenantState| state.delete_branch(branch).map(|edits| (edits.clone(), edits));
        let edits = tenant.log().commit(plan).await.map_err(EngineError::from)?;
        if let Some(live) = tenant.opened(timeline) {
            live.end_stream(StreamEnd::Ended).await?;
        }
        let mut said = format!("{branch} is deleted");
        for timeline in removed_timelines(&edits) {
            tenant.remove_timeline(timeline).await;
            write!(said, "; {timeline} is gone")?;
        }
        Ok(said)
    }

    async fn read(&self, branch: &str, page: u32, at: Option<Lsn>, server: usize) -> Said<String> {
        let live = self.live_on(server, branch).await?;
        let lsn = at.unwrap_or(live.positions().head());
        live.wait_applied(lsn, READ_WAIT_MAX).await?;
        let history = live.history().clone();
        let read = live.threads().call(move || relation::block(&*history, RELATION, page, lsn)).await?;
        let values = match read {
            Ok(page) => values(&page[..]),
            Err(RelationError::History(error)) => return Err(error.into()),
            Err(_) => "there is no such page".to_owned(),
        };
        Ok(format!("{} at {lsn}: {values}", live.id()))
    }

    async fn merge(&self, branch: &str) -> Said<String> {
        let live = self.live(branch).await?;
        live.flush_all().await?;
        let queue = &self.process(self.active)?.context().queue;
        while !queue.is_idle(self.tenant, live.id()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.layers(branch).await
    }

    async fn positions(&self, branch: &str) -> Said<String> {
        let live = self.live(branch).await?;
        // Merely a look: it must not wait for a compute, as who needs the tail does.
        let tail = tokio::time::timeout(TAIL_LOOK, live.wait_tail()).await.is_ok_and(|tail| tail.is_ok());
        let (head, layered) = (live.positions().head(), live.positions().layered());
        let tail = if tail { "known" } else { "unknown" };
        Ok(format!("{}: head {head}, layers up to {layered}, tail {tail}", live.id()))
    }

    async fn layers(&self, branch: &str) -> Said<String> {
        let (store, timeline) = (self.store.reliable(), self.state().await?.branch(branch)?.facts.id);
        let folder = timeline_folder(self.tenant, timeline)?;
        let manifest = edit_log::read_state::<ManifestState>(&store, &folder).await?.map(|(state, _)| state);
        let mut rows: Vec<_> = manifest.iter().flat_map(|state| state.layers().cloned()).collect();
        rows.sort_by_key(|row| (row.lsn_start, row.lsn_end, row.is_blocks()));
        let listed = store.list(&folder).await?;
        let objects = listed.iter().filter(|listed| listed.name.as_str().contains("/layers/")).count();
        let mut said = format!("{timeline} has {} layers, {objects} objects", rows.len());
        for row in rows {
            let what = if row.is_blocks() { "pages" } else { "the rest" };
            write!(said, "\n{}..{} of {what}: {} versions", row.lsn_start, row.lsn_end, row.versions)?;
        }
        Ok(said)
    }

    async fn state(&self) -> Said<Arc<TenantState>> {
        let state = tenant_log::read(&self.store.reliable(), self.tenant).await?;
        Ok(Arc::new(state.ok_or("there is no tenant")?))
    }

    async fn log(&mut self) -> Said<String> {
        let mut lines = Vec::new();
        let mut entries = edit_log::dump::<TenantState>(&self.store.reliable(), &tenant_folder(self.tenant)?).await?;
        entries.sort_by_key(|dumped| (dumped.entry, matches!(dumped.kind, EntryKind::Snapshot)));
        for dumped in entries {
            if matches!(dumped.kind, EntryKind::Snapshot) || !self.shown.insert(dumped.entry) {
                continue;
            }
            let mut told: Vec<String> = dumped.edits.iter().map(edit).collect();
            if let EntryKind::Seal { by } = dumped.kind {
                told.push(format!("sealed by generation {by}"));
            }
            let EntryId { generation, number } = dumped.entry;
            lines.push(format!("generation {generation} entry {number}: {}", told.join(", ")));
        }
        Ok(if lines.is_empty() { "nothing new".to_owned() } else { lines.join("\n") })
    }

    async fn idle(&self, seconds: u64) -> Said<String> {
        let process = self.process(self.active)?;
        for _ in 0..seconds {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if let Some(tenant) = process.owned() {
                tenant.note_figures(Duration::ZERO).await;
                tenant.close_idle(UNUSED_MAX).await;
            }
        }
        Ok(opened(process))
    }
}

/// Start of the record before `base`, and how many tuples each page has there.
fn stands_at(live: &Arc<LiveTimeline>, base: Lsn) -> Result<(Lsn, Vec<u16>), EngineError> {
    let mut owners = live.owners(base).into_iter();
    // What stands at a timeline's very start was written on its ancestor.
    let holder = owners.find(|(owner, lsn)| *lsn > owner.facts().start || owner.ancestor().is_none());
    let (owner, lsn) = holder.unwrap_or((live.clone(), base));
    let boundary = moments::round_down(&**owner.history(), lsn, owner.facts().start, lsn)?;
    let mut tuples = Vec::new();
    for block in 0..BLOCKS {
        tuples.push(match relation::block(&**live.history(), RELATION, block, base) {
            Ok(page) => tuple_count(&page[..]),
            Err(RelationError::History(error)) => return Err(error.into()),
            Err(_) => 0,
        });
    }
    Ok((boundary.record_start, tuples))
}

/// How many line pointers a heap page has.
fn tuple_count(page: &[u8]) -> u16 {
    u16::from_le_bytes([page[12], page[13]]).saturating_sub(24) / 4
}

/// The values on a heap page, in the order of its line pointers.
fn values(page: &[u8]) -> String {
    let mut found = Vec::new();
    for number in 0..usize::from(tuple_count(page)) {
        let pointer = &page[24 + 4 * number..][..4];
        let tuple = usize::from(u16::from_le_bytes([pointer[0], pointer[1]]) & 0x7FFF);
        let marker = &page[tuple + 24..][..16];
        found.push(String::from_utf8_lossy(marker).trim_end_matches('\0').to_owned());
    }
    if found.is_empty() { "no values".to_owned() } else { found.join(" ") }
}

fn branches(state: &TenantState) -> String {
    state.branches().map(|(name, timeline)| format!("{name} is {timeline}")).collect::<Vec<_>>().join("\n")
}

fn opened(process: &Process) -> String {
    let mut open: Vec<_> = process.owned().iter().flat_map(|tenant| tenant.all_opened()).collect();
    open.sort_by_key(|live| live.facts().tli);
    let open: Vec<String> = open.iter().map(|live| live.id().to_string()).collect();
    if open.is_empty() { "nothing is open".to_owned() } else { format!("open: {}", open.join(" ")) }
}

/// An edit of the tenant's log in words.
fn edit(edit: &TenantEdit) -> String {
    match edit {
        TenantEdit::Tenant(facts) => format!("tenant {}", facts.name),
        TenantEdit::Timeline(TimelineFacts { id, ancestor, .. }) => match ancestor {
            Some(Ancestor { timeline, lsn }) => format!("timeline {id} from {timeline} at {lsn}"),
            None => format!("timeline {id}"),
        },
        TenantEdit::Branch { name, timeline } => format!("{name} is {timeline}"),
        TenantEdit::BranchRemoved { name } => format!("no {name}"),
        TenantEdit::TimelineRemoved { timeline } => format!("no {timeline}"),
        TenantEdit::Epoch { timeline, epoch, lsn, wal_log } => {
            format!("epoch {epoch} of {timeline} from {lsn} on, in {wal_log}")
        }
        TenantEdit::EpochClosed { timeline, epoch, lsn } => format!("epoch {epoch} of {timeline} is closed at {lsn}"),
        TenantEdit::EpochMoved { timeline, epoch, wal_log } => format!("epoch {epoch} of {timeline} is in {wal_log}"),
        TenantEdit::Figures { timeline, head, .. } => format!("figures of {timeline} at {head}"),
        TenantEdit::Owner { generation, server, .. } => format!("{server} is the owner in generation {generation}"),
        other => format!("{other:?}"),
    }
}
