//! What `varve-protocol` promises, one module for each promise.

mod clients_pipeline_and_reconnect;
mod fake_service;
mod messages_survive_the_wire;
mod postgres_framing_is_total;
