//! WAL that is left in the `pg_wal` of a compute whose processes were killed: before it begins again, its process
//! brings what of it the pageserver lacks.

use bytes::Bytes;
use futures::stream::BoxStream;
use varve_api::host::{LeftoverQuery, LeftoverStart};
use varve_postgres::Lsn;
use varve_storage::ids::{TimelineId, WriterEpoch};

use crate::error::Error;
use crate::ports::{LeftoverOf, Pageserver, PortResult};
use crate::{Control, moment};

impl<P: Pageserver> Control<P> {
    /// Whose leftover a compute's process asks about; none when its branch has another history by now, or it has none.
    async fn leftover_of(&self, id: &str, query: &LeftoverQuery) -> Result<Option<LeftoverOf>, Error> {
        let entry = self.process(id)?;
        let timeline: TimelineId = query.timeline_id.parse().map_err(|error| Error::argument("timeline_id", error))?;
        let log = self.own_for_compute(entry.tenant, "a compute has WAL left").await?;
        let state = log.state();
        let Ok(row) = state.endpoint(entry.id) else { return Ok(None) };
        let serves = state.branch(row.branch.as_str()).is_ok_and(|now| now.facts.id == timeline);
        let of = LeftoverOf { tenant: entry.tenant, branch: row.branch.clone(), timeline, epoch: WriterEpoch(query.epoch) };
        Ok((serves && row.moment.is_none()).then_some(of))
    }

    /// Says where leftover WAL would go on.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn leftover_start(&self, id: &str, query: &LeftoverQuery) -> Result<LeftoverStart, Error> {
        let lsn = match self.leftover_of(id, query).await? {
            Some(of) => self.pageserver.leftover_start(of).await?,
            None => None,
        };
        Ok(LeftoverStart { lsn: lsn.map(|lsn| lsn.to_string()) })
    }

    /// Takes leftover WAL.
    ///
    /// # Errors
    /// [`Error`]. What came before an error, whole and sound, counts.
    pub async fn take_leftover(
        &self,
        id: &str,
        query: &LeftoverQuery,
        bytes: BoxStream<'static, PortResult<Bytes>>,
    ) -> Result<LeftoverStart, Error> {
        let position = |name: &'static str, text: &Option<String>| -> Result<Lsn, Error> {
            moment::lsn(name, text.as_deref().ok_or_else(|| Error::argument(name, "it is missing"))?)
        };
        let (start, end) = (position("start", &query.start)?, position("end", &query.end)?);
        let Some(of) = self.leftover_of(id, query).await? else { return Ok(LeftoverStart { lsn: None }) };
        let lsn = self.pageserver.take_leftover(of, start, end, bytes).await?;
        Ok(LeftoverStart { lsn: Some(lsn.to_string()) })
    }
}
