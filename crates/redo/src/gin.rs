//! Page functions of one resource manager.

use varve_postgres::Page;

use crate::{Fault, Redo};

pub(crate) fn redo(_redo: &Redo<'_>, _page: &mut Page) -> Result<(), Fault> {
    Err(Fault::Unsupported)
}
