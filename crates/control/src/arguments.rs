//! Arguments as people and programs send them, looked at in full before anything is done.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use varve_api::kept_files;
use varve_storage::ids::{BranchName, EndpointId, HostId, TenantId, TenantName};

use crate::error::{Error, quoted};

/// Items of a page of a list where nobody says how many.
pub const PAGE_DEFAULT: usize = 100;
/// Most items of a page of a list.
pub const PAGE_MAX: usize = 1000;
/// Longest text that says where to listen.
const LISTEN_CHARS_MAX: usize = 1000;
/// A new tenant's name. It may not look like an id, since an address takes both.
pub(crate) fn new_tenant_name(text: &str) -> Result<TenantName, Error> {
    let name: TenantName = text.parse().map_err(|error| Error::argument("name", error))?;
    not_an_id(text)?;
    Ok(name)
}

/// A new branch's name. It may not look like an id, since an address takes both.
pub(crate) fn new_branch_name(text: &str) -> Result<BranchName, Error> {
    let name: BranchName = text.parse().map_err(|error| Error::argument("name", error))?;
    not_an_id(text)?;
    Ok(name)
}

fn not_an_id(text: &str) -> Result<(), Error> {
    match text.parse::<TenantId>() {
        Ok(_) => Err(Error::argument("name", format!("'{text}' looks like an id (32 hexadecimal digits): choose another name"))),
        Err(_) => Ok(()),
    }
}

/// Id of a compute.
pub(crate) fn endpoint_id(text: &str) -> Result<EndpointId, Error> {
    text.parse().map_err(|_| Error::UnknownCompute(quoted(text)))
}

/// Id of a host.
pub(crate) fn host_id(text: &str) -> Result<HostId, Error> {
    text.parse().map_err(|error| Error::argument("host", error))
}

/// Addresses to listen on, as `listen_addresses`.
pub(crate) fn listen(text: &str) -> Result<String, Error> {
    let fits = |part: &str| {
        let part = part.trim();
        part == "*" || (!part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b".:-".contains(&b)))
    };
    if text.len() > LISTEN_CHARS_MAX || !text.split(',').all(fits) {
        return Err(Error::argument("listen", "expected one or more addresses with commas between them, such as 127.0.0.1 or *"));
    }
    let parts: Vec<&str> = text.split(',').map(str::trim).collect();
    Ok(parts.join(","))
}

/// A port to listen on.
pub(crate) fn port(port: u16) -> Result<u16, Error> {
    if port == 0 { Err(Error::argument("port", "0 is no port: leave it out to get a free one")) } else { Ok(port) }
}

/// Path of a file in a data directory that is kept.
pub(crate) fn file_path(path: &str) -> Result<(), Error> {
    kept_files::check(path).map_err(|problem| Error::argument("path", format!("'{}' {problem}", quoted(path))))
}

/// Which part of a list somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Only names that begin so.
    pub prefix: String,
    /// Only names after this one.
    pub after: Option<String>,
    /// At most so many.
    pub limit: usize,
}

impl Page {
    /// Reads what a request says; the cursor is what [`Page::cursor`] gave.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn parse(prefix: Option<&str>, cursor: Option<&str>, limit: Option<usize>) -> Result<Page, Error> {
        let limit = limit.unwrap_or(PAGE_DEFAULT);
        if limit == 0 || limit > PAGE_MAX {
            return Err(Error::argument("limit", format!("expected 1 to {PAGE_MAX}")));
        }
        let prefix = prefix.unwrap_or_default().to_owned();
        // Anything else begins no name; it could be part of another object's name, though.
        if prefix.len() > 63 || !prefix.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b)) {
            return Err(Error::argument("prefix", format!("'{}' begins no name", quoted(&prefix))));
        }
        let after = match cursor {
            None => None,
            Some(text) => {
                let bytes = BASE64.decode(text).ok();
                let name = bytes.and_then(|bytes| String::from_utf8(bytes).ok()).filter(|name| name.parse::<TenantName>().is_ok());
                Some(name.ok_or_else(|| Error::argument("cursor", "it is none that this server gave: begin without one"))?)
            }
        };
        Ok(Page { prefix, after, limit })
    }

    /// The cursor of the page that follows the item `last`.
    pub fn cursor(last: &str) -> String {
        BASE64.encode(last)
    }
}

impl Default for Page {
    fn default() -> Page {
        Page { prefix: String::new(), after: None, limit: PAGE_DEFAULT }
    }
}

/// Some of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed<T> {
    /// The items.
    pub items: Vec<T>,
    /// The cursor of what follows, if anything does.
    pub next: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_made_anew_are_refused_by_their_path() {
        file_path("conf.d/server.conf").unwrap();
        for path in ["../../x", "global/pg_control"] {
            let told = file_path(path).unwrap_err().to_string();
            assert!(told.starts_with(&format!("path: '{path}' ")), "{told}");
        }
    }

    #[test]
    fn a_cursor_is_read_back_and_others_are_refused() {
        let page = Page::parse(Some("ac"), Some(&Page::cursor("acme")), Some(7)).unwrap();
        assert_eq!(page, Page { prefix: "ac".to_owned(), after: Some("acme".to_owned()), limit: 7 });
        assert_eq!(Page::parse(None, None, None).unwrap(), Page::default());
        for (prefix, cursor, limit) in [(Some("a/b"), None, None), (None, Some("%"), None), (None, None, Some(0)), (None, None, Some(1001))]
        {
            assert!(matches!(Page::parse(prefix, cursor, limit), Err(Error::Argument { .. })), "{prefix:?} {cursor:?} {limit:?}");
        }
    }

    #[test]
    fn names_that_look_like_ids_and_strange_addresses_are_refused() {
        assert!(new_tenant_name(&"0a".repeat(16)).is_err());
        assert!(new_branch_name(&"0a".repeat(16)).is_err());
        assert!(new_tenant_name(&"0a".repeat(15)).is_ok());
        assert_eq!(listen("127.0.0.1, ::1").unwrap(), "127.0.0.1,::1");
        for bad in ["", ",", "a b", "x'y", "127.0.0.1,", &"1".repeat(2000)] {
            assert!(listen(bad).is_err(), "{bad:?}");
        }
    }
}
