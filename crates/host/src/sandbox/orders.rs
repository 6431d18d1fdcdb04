//! The orders of a sandbox, over a socket that is init's standard input: first what is to run, with a descriptor for
//! each folder that it sees, then a byte for each signal. Their end is the end of the sandbox.
//!
//! Folders come as descriptors of mounts that the supervisor has cloned. So a shell can be made before they are there,
//! and init follows no path of the host's.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::spec::Program;

/// Folders that a sandbox shows at most.
const FOLDERS_MAX: usize = 16;
/// Bytes that say what is to run at most: arguments are the longest part.
const PROGRAM_MAX: u32 = 1 << 20;

/// Says what is to run. Blocks until init has taken it.
///
/// # Errors
/// When a folder cannot be cloned, or init is gone.
pub(super) fn send(orders: &mut UnixStream, program: &Program) -> io::Result<()> {
    let clone = |(path, _): (&std::path::PathBuf, bool)| {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, path, flags).map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
    };
    let folders: Vec<OwnedFd> = program.shown().map(clone).collect::<io::Result<_>>()?;
    if folders.len() > FOLDERS_MAX {
        return Err(io::Error::other(format!("a sandbox shows {FOLDERS_MAX} folders at most, not {}", folders.len())));
    }
    let text = serde_json::to_vec(program)?;
    let length = u32::try_from(text.len()).ok().filter(|length| *length <= PROGRAM_MAX);
    let length = length.ok_or_else(|| io::Error::other(format!("the arguments have {} bytes, more than {PROGRAM_MAX}", text.len())))?;
    let descriptors: Vec<BorrowedFd<'_>> = folders.iter().map(|folder| folder.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FOLDERS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("the folders of a sandbox do not fit into a message"));
    }
    // Four bytes go at once, and the descriptors with them.
    rustix::net::sendmsg(&*orders, &[IoSlice::new(&length.to_be_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
    orders.write_all(&text)
}

/// What is to run, and its folders. None if the orders end before.
///
/// # Errors
/// When they cannot be read or understood.
pub(super) fn receive(orders: &mut UnixStream) -> io::Result<Option<(Program, Vec<OwnedFd>)>> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FOLDERS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::WAITALL | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match rustix::net::recvmsg(&*orders, &mut [IoSliceMut::new(&mut length)], &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    if received.bytes < length.len() {
        return Ok(None);
    }
    let mut folders = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            folders.extend(descriptors);
        }
    }
    let length = u32::from_be_bytes(length);
    if length > PROGRAM_MAX {
        return Err(io::Error::other("they are too long"));
    }
    let mut text = vec![0; length as usize];
    orders.read_exact(&mut text)?;
    let program: Program = serde_json::from_slice(&text)?;
    if program.shown().count() != folders.len() {
        return Err(io::Error::other("they name other folders than came"));
    }
    Ok(Some((program, folders)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_that_end_are_none() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(receive(&mut ours).unwrap().is_none());
    }

    #[test]
    fn what_is_no_program_is_an_error() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[0, 0, 0, 2, b'{', b'x']).unwrap();
        assert!(receive(&mut ours).is_err());
        theirs.write_all(&[0xff; 4]).unwrap();
        assert!(receive(&mut ours).is_err(), "a length beyond all measure");
    }
}
