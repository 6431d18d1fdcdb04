//! What compute processes ask: to begin, to attach, for orders; and what they tell: that they ended, files, blocks of
//! their start.
//!
//! The timeline of a compute is that of its branch in the tenant's log, looked up each time. A process that runs on
//! another one is refused.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use varve_api::admin::EventKind;
use varve_api::host::{
    Attach, Attached, Begin, BeginRequest, BlockName, CacheReport, Desired, Ended, FileVersion, HostAction, Orders, OrdersQuery, Password,
    size_text,
};
use varve_api::{Code, Refusal, kept_files};
use varve_postgres::{Lsn, Timestamp};
use varve_storage::ids::{TenantId, TimelineId, WriterEpoch};
use varve_storage::tenant_log::{EndpointRow, FileContents, TenantEdit, TenantLog, TenantState};

use crate::error::{Error, quoted};
use crate::hosts::ORDERS_WAIT;
use crate::logs::facts;
use crate::pages::is_of_pages;
use crate::ports::{AttachWriter, EpochStart, Moment, Pageserver};
use crate::registry::{Entry, Phase, Process, Status, host_of};
use crate::sizes::size_of;
use crate::{Control, arguments, moment, verification};

/// How often a begin follows a branch that is restored or renamed meanwhile.
const BEGIN_TRIES: u32 = 10;
/// Pause between two tries.
const BEGIN_PAUSE: Duration = Duration::from_millis(100);
/// How long a compute that is told to begin anew may take to do so by itself.
const BEGIN_ANEW_MAX: Duration = Duration::from_secs(3);
/// How long its host may take to end it.
const START_AGAIN_MAX: Duration = Duration::from_secs(30);
/// The log follows a compute's base so often, in microseconds.
const BASES_KEPT_FOR: i64 = 300 * 1_000_000;
/// Most blocks that a start tells.
const STARTUP_BLOCKS_MAX: usize = 100_000;

/// Where a compute begins.
struct Beginning {
    timeline: TimelineId,
    lsn: Lsn,
    epoch: Option<EpochStart>,
}

/// The row of a compute that may run.
fn running_row(state: &TenantState, entry: &Entry) -> Result<Arc<EndpointRow>, Error> {
    let row = state.endpoint(entry.id).map_err(|_| Error::Fenced("its branch was deleted, or it was thrown away"))?;
    if row.wanted { Ok(row.clone()) } else { Err(Error::Fenced("it was told to end")) }
}

/// The password that a compute's superuser is to have.
fn password(state: &TenantState, tenant: TenantId) -> Result<Password, Error> {
    let row = state.password().ok_or_else(|| Error::UnknownTenant(tenant.to_string()))?;
    Ok(Password { number: row.number, verifier: row.verifier })
}

/// The timeline that a compute serves: its branch's, or its moment's.
fn timeline_of(state: &TenantState, row: &EndpointRow) -> Result<TimelineId, Error> {
    match row.moment {
        Some(moment) => Ok(moment.timeline),
        None => Ok(state.branch(row.branch.as_str())?.facts.id),
    }
}

impl<P: Pageserver> Control<P> {
    /// Tells a compute to begin anew. One that does not hear it in time, frozen perhaps, is ended by its host and
    /// started again.
    pub(crate) fn begin_anew(&self, entry: &Arc<Entry>) {
        entry.update(|status| {
            status.incarnation += 1;
            status.phase = Phase::Starting;
        });
        let told = entry.status().incarnation;
        let (me, entry) = (self.me.clone(), entry.clone());
        self.environment.spawn(async move {
            let Some(control) = me.upgrade() else { return };
            let has_begun = |status: &Status| status.incarnation != told || status.desired != Desired::Run;
            if entry.wait(&control.environment, BEGIN_ANEW_MAX, has_begun).await.is_some() {
                return;
            }
            tracing::warn!(compute = %entry.id, branch = entry.branch(), "it does not begin anew by itself: its host ends it and starts it again");
            control.order(&entry, HostAction::End);
            let is_gone = |status: &Status| status.process == Process::Gone || status.desired != Desired::Run;
            entry.wait(&control.environment, START_AGAIN_MAX, is_gone).await;
            if entry.status().desired == Desired::Run {
                control.order(&entry, HostAction::Run);
            }
        });
    }

    /// The compute that a process says it is. One that nobody has told of yet is asked to try again: its host says
    /// hello first, and ends it if it is not wanted.
    pub(crate) fn process(&self, id: &str) -> Result<Arc<Entry>, Error> {
        let id = arguments::endpoint_id(id)?;
        self.computes.get(id).ok_or_else(|| Error::NotYetKnown(id.to_string()))
    }

    /// A compute begins an incarnation: whoever wrote the branch before is fenced.
    ///
    /// # Errors
    /// [`Error::Fenced`] when it may not run; [`Error::NotOwner`] when its tenant is another server's.
    pub async fn begin(&self, id: &str, request: &BeginRequest) -> Result<Begin, Error> {
        let entry = self.process(id)?;
        let begun = self.begin_entry(&entry, request).await;
        let waits_for = begun.as_ref().err().filter(|error| error.is_transient());
        entry.update(|status| status.waits_for = waits_for.map(|error| Refusal::new(error.code(), error.to_string())));
        if let Err(error) = &begun
            && !error.is_transient()
            && entry.status().desired == Desired::Run
            && error.code() != Code::Fenced
        {
            // Trying again will not help: it fails, and says why, until an operator has done something about it.
            entry.update(|status| status.phase = Phase::Failed(error.to_string()));
            self.events.add(entry.id, self.environment.now(), EventKind::StartFailed, &error.to_string());
            self.order(&entry, HostAction::End);
        }
        begun
    }

    async fn begin_entry(&self, entry: &Arc<Entry>, request: &BeginRequest) -> Result<Begin, Error> {
        let _turn = entry.turn.lock().await;
        if let (Some(asking), Some(on)) = (&request.host, host_of(entry))
            && *asking != on.to_string()
        {
            return Err(Error::Fenced("it runs on another host by now"));
        }
        if entry.status().desired != Desired::Run {
            return Err(Error::Fenced("it was told to end"));
        }
        let log = self.own_for_compute(entry.tenant, "a compute begins").await?;
        let (row, beginning) = self.beginning(&log, entry).await?;
        let places = self.pageserver.places(entry.tenant, beginning.timeline, beginning.lsn).await?;
        let epoch = beginning.epoch.as_ref().map(|start| start.epoch);
        entry.update(|status| {
            status.incarnation += 1;
            status.epoch = epoch;
            status.timeline = Some(beginning.timeline);
            status.phase = if status.desired == Desired::Run { Phase::Starting } else { status.phase.clone() };
            status.pid = None;
        });
        let state = log.state();
        let facts = facts(&state, entry.tenant)?;
        let password = password(&state, entry.tenant)?;
        let pages = self.pages_at(&state, entry.tenant, beginning.timeline, beginning.lsn).await?;
        Ok(Begin {
            tenant: facts.name.to_string(),
            branch: row.branch.to_string(),
            tenant_id: facts.id.to_string(),
            timeline_id: beginning.timeline.to_string(),
            pg_version: facts.pg_version,
            base_lsn: beginning.lsn.to_string(),
            epoch: epoch.map(|epoch| epoch.0),
            standby_name: beginning.epoch.map(|start| start.standby_name),
            incarnation: entry.status().incarnation,
            page_service: self.pageserver.page_service(),
            listen: row.listen.clone(),
            port: row.port,
            password_verifier: password.verifier,
            password_number: password.number,
            databases: places.databases,
            tablespaces: places.tablespaces.iter().map(|(spc, _)| *spc).collect(),
            tablespace_locations: places.tablespaces,
            catalog_version: places.catalog_version,
            startup_blocks: places.startup_blocks,
            // The entry of a temporary branch knows them only as long as this process lives.
            settings: if state.is_verifying(beginning.timeline) {
                verification::run::settings().into_iter().collect()
            } else {
                entry.settings()
            },
            pages,
            size: size_of(&state, entry.id),
        })
    }

    /// Where a compute begins: at its moment, or at the head of its branch, in a writer epoch of its own. A branch that
    /// is restored or renamed at this very time is looked up again.
    async fn beginning(&self, log: &TenantLog, entry: &Arc<Entry>) -> Result<(Arc<EndpointRow>, Beginning), Error> {
        for _ in 0..BEGIN_TRIES {
            let state = log.state();
            let row = running_row(&state, entry)?;
            entry.set_row(row.clone());
            entry.set_size(size_of(&state, entry.id));
            if let Some(moment) = row.moment {
                return Ok((row, Beginning { timeline: moment.timeline, lsn: moment.lsn, epoch: None }));
            }
            let timeline = timeline_of(&state, &row)?;
            match self.pageserver.begin_epoch(entry.tenant, &row.branch, timeline).await {
                Ok(epoch) => return Ok((row, Beginning { timeline, lsn: epoch.lsn, epoch: Some(epoch) })),
                // The move may not be durable yet.
                Err(refusal) if refusal.code == Code::Fenced => {
                    tracing::info!(compute = %entry.id, %refusal, "its branch moved");
                    self.environment.sleep(BEGIN_PAUSE).await;
                }
                Err(refusal) => return Err(refusal.into()),
            }
        }
        Err(Error::Moved(entry.branch()))
    }

    /// A compute's Postgres runs: its WAL is received from now on.
    ///
    /// # Errors
    /// [`Error::Fenced`] when it runs on a timeline that its branch does not point to any more.
    pub async fn attach(&self, id: &str, attach: Attach) -> Result<Attached, Error> {
        let entry = self.process(id)?;
        let _turn = entry.turn.lock().await;
        let flushed: Lsn = moment::lsn("flushed", &attach.flushed)?;
        let timeline: TimelineId = attach.timeline_id.parse().map_err(|error| Error::argument("timeline_id", error))?;
        let status = entry.status();
        if status.desired == Desired::Fenced || attach.incarnation < status.incarnation {
            return Err(Error::Fenced("it was replaced"));
        }
        let log = self.own_for_compute(entry.tenant, "a compute attaches").await?;
        let state = log.state();
        // One that was told to stop may attach again: its last WAL is to arrive.
        let row = state.endpoint(entry.id).map_err(|_| Error::Fenced("its branch was deleted, or it was thrown away"))?.clone();
        if timeline_of(&state, &row)? != timeline {
            return Err(Error::Fenced("its branch points to another history by now"));
        }
        let mut standby_name = None;
        if row.moment.is_none() {
            let epoch = WriterEpoch(attach.epoch.ok_or_else(|| Error::argument("epoch", "a compute that writes its branch has one"))?);
            let writer = AttachWriter {
                tenant: entry.tenant,
                branch: row.branch.clone(),
                timeline,
                epoch,
                walsender: attach.walsender.clone(),
                flushed,
                waits_for: attach.waits_for.clone(),
            };
            self.note_run(&log, timeline, epoch).await?;
            standby_name = Some(self.pageserver.attach_writer(writer).await?);
        }
        entry.set_row(row);
        entry.set_size(size_of(&state, entry.id));
        for warning in attach.warnings.iter().filter(|_| status.warnings != attach.warnings) {
            self.events.add(entry.id, self.environment.now(), EventKind::Repaired, warning);
        }
        entry.update(|status| {
            if status.incarnation != attach.incarnation {
                (status.cache, status.bases, status.limits) = (None, Vec::new(), None);
                status.bases_kept = None;
            }
            status.incarnation = attach.incarnation;
            status.epoch = attach.epoch.map(WriterEpoch);
            status.timeline = Some(timeline);
            status.pid = Some(attach.pid);
            status.mount_pid = Some(attach.mount_pid);
            status.warnings.clone_from(&attach.warnings);
            if status.desired == Desired::Run {
                status.phase = Phase::Running;
            }
        });
        Ok(Attached { standby_name, password: Some(password(&log.state(), entry.tenant)?) })
    }

    /// A compute's process ends. Where it ended cleanly its epoch is closed first, so that an answer means that nothing
    /// of it is missing.
    ///
    /// # Errors
    /// What keeps the epoch from being closed; the process tries again, or says that it is not clean.
    pub async fn ended(&self, id: &str, ended: &Ended) -> Result<(), Error> {
        let entry = self.process(id)?;
        let _turn = entry.turn.lock().await;
        let status = entry.status();
        if ended.incarnation != status.incarnation && status.incarnation != 0 {
            return Ok(()); // of an incarnation that is over
        }
        let mut clean = ended.clean;
        if ended.clean && entry.writes() {
            let told = ended.timeline_id.as_ref().map(|id| id.parse().map_err(|error| Error::argument("timeline_id", error)));
            // Where we were started since it attached, its own word says what it wrote; its checkpoint, that it is
            // here.
            let told: Option<TimelineId> = told.transpose()?.filter(|_| ended.checkpoint.is_some());
            match (status.timeline.or(told), status.epoch.or(ended.epoch.map(WriterEpoch))) {
                (Some(timeline), Some(epoch)) => {
                    let log = self.own_for_compute(entry.tenant, "a compute has ended").await?;
                    let checkpoint = ended.checkpoint.as_deref().map(|text| moment::lsn("checkpoint", text)).transpose()?;
                    self.pageserver.close_epoch(entry.tenant, timeline, epoch, checkpoint).await?;
                    self.keep_pages(&log, entry.tenant, (timeline, epoch), &ended.pages).await?;
                }
                // What it sent last may not have arrived.
                _ => clean = false,
            }
        }
        tracing::info!(compute = %entry.id, clean, reason = ended.reason, "a compute ended");
        entry.update(|status| {
            status.warnings.clone_from(&ended.warnings);
            status.phase = match status.desired {
                _ if matches!(status.phase, Phase::Failed(_)) => return, // that is why it was told to end
                Desired::Run if !clean => Phase::Failed(ended.reason.clone()),
                // Told to end on its host: it is still wanted, and starts again with the host.
                Desired::Run => Phase::Starting,
                Desired::Stop | Desired::Fenced => Phase::Ended { clean, reason: ended.reason.clone() },
            };
        });
        if let Phase::Failed(reason) = entry.status().phase {
            self.events.add(entry.id, self.environment.now(), EventKind::StartFailed, &reason);
            self.order(&entry, HostAction::End); // else the host would start it again
        }
        Ok(())
    }

    /// What a compute is to do; waits while that is what it does already.
    ///
    /// # Errors
    /// [`Error::NotYetKnown`].
    pub async fn orders(&self, id: &str, query: &OrdersQuery) -> Result<Orders, Error> {
        let OrdersQuery { incarnation, server_run, size, check } = query;
        let (entry, incarnation) = (self.process(id)?, *incarnation);
        // After our own restart the incarnation is the compute's, until it has attached.
        let number = |status: &Status| if status.incarnation == 0 { incarnation } else { status.incarnation };
        let run = |status: &Status| format!("{}.{}", self.run, status.attach_again);
        let has_other_size = |status: &Status| size.as_ref().is_some_and(|known| *known != size_text(&status.size));
        let has_other_check = |status: &Status| check.is_some_and(|known| status.check.is_some_and(|check| check != known));
        let is_news = |status: &Status| {
            let is_other = has_other_size(status) || has_other_check(status);
            status.desired != Desired::Run || number(status) != incarnation || run(status) != *server_run || is_other
        };
        let status = entry.wait(&self.environment, ORDERS_WAIT, is_news).await.unwrap_or_else(|| entry.status());
        Ok(Orders {
            desired: status.desired,
            incarnation: number(&status),
            server_run: run(&status),
            size: Some(status.size),
            check: status.check,
        })
    }

    /// A compute tells which blocks its start read: later starts of the same template get them in one batch.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn learn_startup_blocks(&self, id: &str, blocks: Vec<BlockName>) -> Result<(), Error> {
        let entry = self.process(id)?;
        if blocks.len() > STARTUP_BLOCKS_MAX {
            return Err(Error::argument("blocks", format!("at most {STARTUP_BLOCKS_MAX}")));
        }
        self.own_for_compute(entry.tenant, "a compute tells of its start").await?;
        Ok(self.pageserver.learn_startup_blocks(entry.tenant, blocks).await?)
    }

    /// The position of a file that is written now: behind the last record that there is, so that a moment up to there
    /// does not have it.
    pub(crate) async fn behind_head(&self, tenant: TenantId, timeline: TimelineId) -> Result<Lsn, Error> {
        let head = match self.pageserver.live(tenant, timeline) {
            Some(live) => live.head,
            None => self.pageserver.resolve(tenant, timeline, Moment::Head).await?.lsn,
        };
        Ok(Lsn(head.0 + 1))
    }

    /// A compute tells how its block cache is, and what it may take right now. Where it is about to read its timeline
    /// elsewhere, history there stays once this has answered.
    ///
    /// # Errors
    /// [`Error::UnknownCompute`]; when it cannot be kept that history stays.
    pub async fn note_cache(&self, id: &str, report: &CacheReport) -> Result<(), Error> {
        let entry = self.process(id)?;
        self.keep_bases(&entry, report).await?;
        entry.update(|status| {
            if status.incarnation == report.incarnation {
                (status.cache, status.limits) = (Some(report.cache), report.limits);
                status.bases.clone_from(&report.bases);
            }
        });
        Ok(())
    }

    /// Writes where a compute reads its timeline, if that moves. The log has a position that it does not read before;
    /// that follows only now and then, and until it does, more is kept than is needed.
    async fn keep_bases(&self, entry: &Entry, report: &CacheReport) -> Result<(), Error> {
        let bases = report.bases.iter().map(|base| moment::lsn("bases", base)).collect::<Result<Vec<Lsn>, _>>()?;
        let Some(lowest) = bases.iter().copied().min() else { return Ok(()) };
        let status = entry.status();
        if status.incarnation != report.incarnation {
            // Nobody knows yet whose it is: it must not read elsewhere before that.
            return if bases.len() > 1 { Err(Error::NotYetKnown(entry.id.to_string())) } else { Ok(()) };
        }
        let (Some(timeline), Some(epoch)) = (status.timeline, status.epoch) else { return Ok(()) };
        let (now, is_news) = (self.environment.now(), status.bases != report.bases);
        let is_recent = |kept: Timestamp| now.0.saturating_sub(kept.0) < BASES_KEPT_FOR;
        match status.bases_kept {
            Some((kept, lsn)) if !is_news && (lsn >= lowest || is_recent(kept)) => return Ok(()),
            None if !is_news && bases.len() <= 1 => return Ok(()),
            _ => {}
        }
        let log = self.own_for_compute(entry.tenant, "a compute reads its timeline elsewhere").await?;
        let state = log.state();
        let newest = state.timeline(timeline)?.epochs.last().copied().filter(|newest| newest.epoch == epoch);
        let newest = newest.ok_or(Error::Fenced("a report of an epoch that is over"))?;
        match newest.base {
            // It reads where it began.
            None if bases == [newest.lsn] => return Ok(()),
            // No cutoff moves behind what the log has.
            Some(_) if status.bases_kept.is_some_and(|(kept, _)| is_recent(kept)) => return Ok(()),
            _ => {}
        }
        self.commit_edits(&log, |state| Ok(state.move_base(timeline, epoch, &bases)?)).await?;
        entry.update(|status| status.bases_kept = Some((now, lowest)));
        Ok(())
    }

    /// Keeps a new version of a file that has no WAL.
    ///
    /// # Errors
    /// [`Error::Argument`] of a path that is none of those; [`Error::Fenced`] of an incarnation that is over.
    pub async fn put_file(&self, id: &str, file: FileVersion) -> Result<(), Error> {
        arguments::file_path(&file.path)?;
        let bytes = match &file.contents {
            Some(text) => Some(BASE64.decode(text).map_err(|error| Error::argument("contents", error))?),
            None => None,
        };
        let entry = self.process(id)?;
        let status = entry.status();
        if status.incarnation == 0 {
            return Err(Error::NotYetKnown(entry.id.to_string())); // it attaches first
        }
        let (Some(timeline), Some(_)) = (status.timeline, status.epoch.filter(|_| file.incarnation == status.incarnation)) else {
            return Err(Error::Fenced("a file of an incarnation that is over"));
        };
        let log = self.own_for_compute(entry.tenant, "a compute keeps a file").await?;
        let contents = match bytes {
            Some(bytes) => self.pageserver.put_file(entry.tenant, bytes).await?,
            None => FileContents::Removed,
        };
        let lsn = self.behind_head(entry.tenant, timeline).await?;
        let id = entry.id;
        self.commit_edits(&log, |state| {
            let row = state.endpoint(id).map_err(|_| Error::Fenced("its branch was deleted"))?;
            if timeline_of(state, row)? != timeline {
                return Err(Error::Fenced("its branch points to another history by now"));
            }
            has_room(state, timeline, &file.path, &contents)?;
            Ok(vec![TenantEdit::File { timeline, path: file.path, lsn, contents }])
        })
        .await
    }
}

/// Whether a branch may have this file, too. Postgres's own folders count for nothing.
fn has_room(state: &TenantState, timeline: TimelineId, path: &str, contents: &FileContents) -> Result<(), Error> {
    if matches!(contents, FileContents::Removed) || kept_files::is_postgress(path) {
        return Ok(());
    }
    let counts = |other: &str| other != path && !kept_files::is_postgress(other) && !is_of_pages(other);
    let others = state.files_at(timeline, Lsn::MAX)?.into_iter().filter(|(other, _)| counts(other));
    let (files, bytes) = others.fold((1, contents.len()), |(files, bytes), (_, other)| (files + 1, bytes + other.len()));
    if files <= kept_files::FILES_MAX && bytes <= kept_files::BYTES_MAX {
        return Ok(());
    }
    let (files_max, mib_max) = (kept_files::FILES_MAX, kept_files::BYTES_MAX >> 20);
    let problem = format!(
        "with '{}' the branch would have {files} files of {bytes} bytes in its data directory; {files_max} of {mib_max} MiB are kept",
        quoted(path)
    );
    Err(Error::argument("path", problem))
}

#[cfg(test)]
mod tests {
    use varve_storage::tenant_log::TimelineFacts;

    use super::*;

    #[test]
    fn a_branch_has_room_for_so_many_files_and_bytes() {
        let timeline = TimelineId([1; 16]);
        let file = |path: String, len: u64| TenantEdit::File {
            timeline,
            path,
            lsn: Lsn(9),
            contents: FileContents::Object { name: "x".to_owned(), len },
        };
        let mut state = TenantState::default();
        let facts = TimelineFacts { id: timeline, tli: 1, start: Lsn(8), ancestor: None, created: 0 };
        state.apply(&TenantEdit::Timeline(facts)).unwrap();
        let room = |state: &TenantState, path: &str, len| {
            has_room(state, timeline, path, &FileContents::Object { name: "y".to_owned(), len }).map_err(|error| error.to_string())
        };
        for i in 1..kept_files::FILES_MAX {
            state.apply(&file(format!("conf.d/{i}"), 1)).unwrap();
            state.apply(&file(format!("pg_logical/snapshots/{i}.snap"), 1 << 30)).unwrap();
        }
        assert_eq!(room(&state, "server.crt", 5), Ok(()), "the last one, and Postgres's own do not count");
        state.apply(&file("server.crt".to_owned(), 5)).unwrap();
        assert_eq!(room(&state, "server.crt", 6), Ok(()), "another version is no other file");
        let told = room(&state, "server.key", 5).unwrap_err();
        assert!(told.contains("'server.key'") && told.contains("1001 files") && told.contains("1000 of 256 MiB"), "{told}");
        assert_eq!(has_room(&state, timeline, "server.key", &FileContents::Removed).map_err(|error| error.to_string()), Ok(()));
        assert_eq!(room(&state, "pg_stat/pgstat.stat", 5), Ok(()));
        assert!(room(&state, "server.crt", kept_files::BYTES_MAX).is_err(), "too large with the others");
    }
}
