//! Templates: what tenants of a Postgres major begin with. A host runs `initdb` once for each, and the pageserver keeps
//! what it made.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use varve_api::Refusal;
use varve_api::host::TemplateOrder;

use crate::Control;
use crate::error::Error;
use crate::hosts::Host;
use crate::ports::{Pageserver, Template};

/// How long a host may take to make one.
const TEMPLATE_MAX: Duration = Duration::from_secs(120);
/// How often it is looked whether it is there.
const TEMPLATE_INTERVAL: Duration = Duration::from_millis(10);

impl<P: Pageserver> Control<P> {
    /// The template of a major, by default the newest that a host has; made if there is none.
    pub(crate) async fn template(&self, pg_version: Option<u32>) -> Result<Template, Error> {
        let pg_version = match pg_version {
            Some(pg_version) => pg_version,
            None => {
                let here = self.hosts.here(&self.environment).await;
                let newest = here.iter().filter_map(|host| host.hello().postgres.iter().map(|(major, _)| *major).max()).max();
                newest.ok_or_else(|| Error::NoHost("no host has Postgres binaries: install some, or name their folder".to_owned()))?
            }
        };
        if let Some(template) = self.pageserver.template_of(pg_version).await? {
            return Ok(template);
        }
        let _turn = self.templating.take(pg_version).await;
        if let Some(template) = self.pageserver.template_of(pg_version).await? {
            return Ok(template);
        }
        let host = self.hosts.with_postgres(&self.environment, pg_version).await?;
        let _host_turn = host.template_turn.lock().await;
        let order = format!("{:032x}", u128::from_be_bytes(self.environment.random()?));
        tracing::info!(host = %host.id, pg_version, "a template is made");
        *host.template_outcome.lock() = None;
        host.order_template(Some(TemplateOrder { order: order.clone(), pg_version }));
        let made = self.environment.within(TEMPLATE_MAX, self.made(&host, &order)).await;
        if made.is_none() {
            host.order_template(None);
        }
        match made {
            Some(made) => made?,
            None => return Err(Error::HostSilent { host: host.hello().name.clone(), seconds: TEMPLATE_MAX.as_secs() }),
        }
        let template = self.pageserver.template_of(pg_version).await?;
        template.ok_or_else(|| Error::NoHost(format!("a template of PostgreSQL {pg_version} was made and is not there")))
    }

    /// Waits for what a host answers to an order.
    async fn made(&self, host: &Host, order: &str) -> Result<(), Error> {
        loop {
            let outcome = host.template_outcome.lock().take();
            if let Some(outcome) = outcome {
                return outcome.map_err(Error::from);
            }
            if host.template_ordered().is_none_or(|ordered| ordered.order != order) {
                return Err(Error::Moved("template".to_owned()));
            }
            self.environment.sleep(TEMPLATE_INTERVAL).await;
        }
    }

    /// A host made the template that it was ordered, or could not.
    ///
    /// # Errors
    /// [`Error::UnknownHost`]; [`Error::Fenced`] of an order that is over; those of the import.
    pub async fn template_made(&self, host: &str, order: &str, made: Result<Bytes, Refusal>) -> Result<(), Error> {
        let host: Arc<Host> = self.host(host)?;
        let ordered = host.template_ordered().filter(|ordered| ordered.order == order);
        let ordered = ordered.ok_or(Error::Fenced("this template is not wanted any more"))?;
        let outcome = match made {
            Ok(archive) => self.pageserver.import_template(ordered.pg_version, archive).await.map(drop),
            Err(refusal) => Err(refusal),
        };
        *host.template_outcome.lock() = Some(outcome.clone());
        // After the outcome: who waits looks at that first.
        host.order_template(None);
        outcome.map_err(Error::from)
    }
}
