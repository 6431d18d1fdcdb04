//! What differs between the minors of one major. Like what differs between majors ([`crate::major`]) it stands in one
//! place; the rest asks here.
//!
//! WAL and data directories do not say which minor wrote them, and a cluster's minor changes under it. So a rule for
//! minors is never chosen by a version: either what is read tells by its shape, or one way is right for all minors.
//! Only a running server can be asked.
//!
//! | what | minors | how we tell |
//! |---|---|---|
//! | synchronous commit had holes | before [`synchronous_commit_min`] | the running server says its version |
//! | heap records name the visibility-map page whose bits they clear | those of August 2026 (18.6) and later | the record's blocks |
//! | creating a multixact sets where the next one begins, too | the newest | redone so for all: a reader can only gain by it |
//! | GiST's "tuples deleted" | see [`GIST_TUPLES_DELETED`] | not at all: redo leaves the flag alone, comparisons mask it |

use crate::Major;

/// The first minor of each major in which a cancelled or interrupted wait for a synchronous standby cannot show a
/// commit as acknowledged that was not (and with it, the first that Varve relies on).
pub fn synchronous_commit_min(major: Major) -> u32 {
    match major {
        Major::V14 => 18,
        Major::V15 => 13,
        Major::V16 => 9,
        Major::V17 => 5,
        Major::V18 => 0,
    }
}

/// GiST's page flag `F_TUPLES_DELETED`, which no minor reads.
///
/// 14.23, 15.18, 16.14, 17.10 and 18.4 set it when vacuum deletes tuples of a leaf, and so does their redo. For a
/// `DELETE` record their redo sets it where their primary does not. 15.20 never sets it. So it says nothing about a
/// page, and two servers may differ in it.
pub const GIST_TUPLES_DELETED: u16 = 1 << 2;
