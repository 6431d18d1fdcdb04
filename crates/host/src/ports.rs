//! Ports that computes listen on: chosen and checked on the machine where they are.

use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};

/// A port that a compute cannot have.
#[derive(Debug, thiserror::Error)]
#[error("port {port} on {address} cannot be used ({source}): choose another one, or leave it out to get a free one")]
pub struct PortError {
    /// The port; 0 where none could be had at all.
    pub port: u16,
    /// The address.
    pub address: String,
    /// Why.
    pub source: io::Error,
}

/// The addresses of a `listen_addresses`, as they are bound.
fn addresses(listen: &str) -> Vec<&str> {
    let bound = |address| if address == "*" { "0.0.0.0" } else { address };
    let all: Vec<&str> = listen.split(',').map(str::trim).filter(|address| !address.is_empty()).map(bound).collect();
    if all.is_empty() { vec!["127.0.0.1"] } else { all }
}

fn bind(address: &str, port: u16) -> Result<TcpListener, PortError> {
    TcpListener::bind((address, port)).map_err(|source| PortError { port, address: address.to_owned(), source })
}

/// Whether a compute could listen on `port` of all addresses of `listen` now. May ask a name server.
///
/// # Errors
/// When another process does, or the machine has no such address.
pub fn check(listen: &str, port: u16) -> Result<(), PortError> {
    addresses(listen).into_iter().try_for_each(|address| bind(address, port).map(drop))
}

/// The addresses of `listen` as numbers, as a `listen_addresses`. May ask a name server.
///
/// # Errors
/// When a name is not known.
pub fn numeric(listen: &str) -> Result<String, PortError> {
    let mut numbers = Vec::new();
    for address in addresses(listen) {
        let found = (address, 0).to_socket_addrs().map_err(|source| PortError { port: 0, address: address.to_owned(), source })?;
        numbers.extend(found.map(|address| address.ip().to_string()));
    }
    numbers.dedup();
    Ok(numbers.join(","))
}

/// Listens on `port` of all addresses of `listen`. May ask a name server.
///
/// # Errors
/// As [`check`].
pub fn listen(listen: &str, port: u16) -> Result<Vec<TcpListener>, PortError> {
    addresses(listen).into_iter().map(|address| bind(address, port)).collect()
}

/// A port that is free now on all addresses of `listen`, and none of `taken`.
///
/// # Errors
/// When there is none, or the machine has no such address.
pub fn free(listen: &str, taken: &[u16]) -> Result<u16, PortError> {
    const TRIES: usize = 100;
    let first = addresses(listen)[0];
    // Held until the end, so that each try gives another port.
    let mut held = Vec::new();
    for _ in 0..TRIES {
        let listener = bind(first, 0)?;
        let port = listener.local_addr().map_err(|source| PortError { port: 0, address: first.to_owned(), source })?.port();
        let others = addresses(listen);
        if !taken.contains(&port) && others.iter().skip(1).all(|address| bind(address, port).is_ok()) {
            return Ok(port);
        }
        held.push(listener);
    }
    Err(PortError { port: 0, address: first.to_owned(), source: io::ErrorKind::AddrInUse.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_refused_and_a_free_one_is_free() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = check("127.0.0.1", port).unwrap_err().to_string();
        assert!(error.contains(&port.to_string()), "{error}");
        assert!(check("*", port).is_err(), "all addresses include loopback");
        assert!(check("127.0.0.2, 127.0.0.1", port).is_err(), "each address counts");
        check("127.0.0.2", port).unwrap();
        let free_one = free("127.0.0.1", &[]).unwrap();
        check("127.0.0.1", free_one).unwrap();
        // 8.8.8.8 is nobody's here.
        assert!(check("8.8.8.8", free_one).is_err() && free("8.8.8.8", &[]).is_err());
    }
}
