//! Page functions of the heap: resource managers Heap and Heap2 (`access/heapam_xlog.h`).

use varve_postgres::Page;

use crate::{Fault, Redo};

pub(crate) fn redo(_redo: &Redo<'_>, _page: &mut Page) -> Result<(), Fault> {
    Err(Fault::Unsupported)
}

pub(crate) fn redo_heap2(_redo: &Redo<'_>, _page: &mut Page) -> Result<(), Fault> {
    Err(Fault::Unsupported)
}
