//! How much of a machine the computes of a branch may take: a row of the tenant's log beside the endpoint's. A compute
//! that runs hears of another size with its orders, and takes it while it runs.

use varve_api::admin::{BranchSize, EventKind};
use varve_api::size::{self, Between, Size, SizeError};
use varve_storage::ids::{EndpointId, HostId};
use varve_storage::tenant_log::{EndpointRow, SizeRange, SizeRow, TenantEdit, TenantState};

use crate::Control;
use crate::call::Call;
use crate::error::Error;
use crate::logs::{Plan, branch, facts};
use crate::ports::Pageserver;
use crate::start::LISTEN_DEFAULT;

impl From<SizeError> for Error {
    fn from(error: SizeError) -> Error {
        Error::argument(error.part, error.problem)
    }
}

/// The size of an endpoint.
pub(crate) fn size_of(state: &TenantState, id: EndpointId) -> Size {
    let between = |range: SizeRange| Between { min: range.min, max: range.max };
    let row = state.size(id);
    Size { cpu_milli: row.and_then(|row| row.cpu_milli).map(between), memory_bytes: row.and_then(|row| row.memory_bytes).map(between) }
}

/// The row that gives endpoint `id` what `size` says, if it has not got that.
pub(crate) fn size_edit(state: &TenantState, id: EndpointId, size: Size) -> Option<TenantEdit> {
    let (before, range) = (size_of(state, id), |between: Between| SizeRange { min: between.min, max: between.max });
    let size = size.or(before);
    let row = SizeRow { id, cpu_milli: size.cpu_milli.map(range), memory_bytes: size.memory_bytes.map(range) };
    (size != before).then_some(TenantEdit::Size(row))
}

/// A size in words.
pub(crate) fn in_words(size: &Size) -> String {
    let part = |between: Option<Between>, words: fn(u64) -> String| match between {
        None => "what the host gives".to_owned(),
        Some(Between { min, max }) if min == max => words(min),
        Some(Between { min, max }) => format!("{} to {}", words(min), words(max)),
    };
    format!("processors: {}; memory: {}", part(size.cpu_milli, size::processors), part(size.memory_bytes, size::bytes))
}

impl<P: Pageserver> Control<P> {
    /// The size of a branch's compute.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn branch_size(&self, tenant: &str, branch_text: &str) -> Result<BranchSize, Error> {
        let id = self.find(tenant).await?;
        let state = self.read(id).await?;
        let (name, _) = branch(&state, branch_text)?;
        let row = state.endpoints_of(&name).find(|row| row.moment.is_none());
        let size = row.map(|row| size_of(&state, row.id)).unwrap_or_default();
        let limits = row.and_then(|row| self.computes.get(row.id)).and_then(|entry| entry.status().limits);
        Ok(BranchSize { branch: format!("{}/{name}", facts(&state, id)?.name), size, limits })
    }

    /// Gives the compute of a branch another size; what `size` leaves out stays. One that runs takes it while it runs.
    ///
    /// # Errors
    /// [`Error::Argument`] of a size that cannot be, or that no host can give.
    pub async fn resize(&self, call: &Call, tenant: &str, branch_text: &str, size: &Size) -> Result<BranchSize, Error> {
        size.check()?;
        if size.is_empty() {
            return Err(Error::argument("cpu_milli", "say what is to change: processors, memory or both"));
        }
        let id = self.find(tenant).await?;
        let log = self.own(id, "its compute gets another size").await?;
        let (name, _) = branch(&log.state(), branch_text)?;
        // Nobody starts a compute with the old one meanwhile.
        let _turn = self.starting.take((id, name.clone())).await;
        let state = log.state();
        if let Some(prior) = call.prior(&state)? {
            return Ok(prior);
        }
        let (name, _) = branch(&state, name.as_str())?;
        let known = state.endpoints_of(&name).find(|row| row.moment.is_none());
        let row = match known {
            Some(row) => EndpointRow::clone(row),
            // Never started: its endpoint begins with this.
            None => EndpointRow {
                id: EndpointId(self.environment.random()?),
                branch: name.clone(),
                moment: None,
                listen: LISTEN_DEFAULT.to_owned(),
                port: 0,
                wanted: false,
                host: None,
            },
        };
        let (endpoint, is_new) = (row.id, known.is_none());
        let new = size.or(size_of(&state, endpoint));
        self.a_host_gives(&new, row.host.filter(|_| row.wanted)).await?;
        let limits = self.computes.get(endpoint).and_then(|entry| entry.status().limits);
        let answer = BranchSize { branch: format!("{}/{name}", facts(&state, id)?.name), size: new, limits };
        let words = in_words(&new);
        let action = format!("resized branch {name}: {words}");
        let plan = |state: &TenantState| {
            let mut edits = if is_new { state.put_endpoint(row)? } else { Vec::new() };
            edits.extend(size_edit(state, endpoint, new));
            Ok(Plan { edits, action, answer: |_: &TenantState| Ok(answer) })
        };
        let answer = self.commit(&log, call, plan).await?;
        self.computes.refresh(id, &log.state());
        self.events.add(endpoint, self.environment.now(), EventKind::Resized, &words);
        Ok(answer)
    }

    /// Whether the host that runs the compute can give a size, or some host that is here.
    async fn a_host_gives(&self, size: &Size, on: Option<HostId>) -> Result<(), Error> {
        let here = self.hosts.here(&self.environment).await;
        let runs_on = here.iter().find(|host| Some(host.id) == on);
        let mut refusal = None;
        for host in runs_on.map_or(here.as_slice(), std::slice::from_ref) {
            match host.gives(size) {
                Ok(()) => return Ok(()),
                Err(error) => refusal = Some(error),
            }
        }
        // Where no host is here yet, the start finds out.
        refusal.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_told_in_words() {
        let size = Size { cpu_milli: Some(Between { min: 250, max: 2000 }), memory_bytes: Some(Between { min: 1 << 30, max: 1 << 30 }) };
        assert_eq!(in_words(&size), "processors: 0.25 processors to 2 processors; memory: 1 GB");
    }
}
