//! Makes the corpora of `fuzz/corpus/` anew: for each target a few small inputs, from the WAL that real servers write
//! while they run the SQL corpus `tests/sql/redo/`. Of each record type and block it keeps the smallest. Arguments are
//! majors, by default those that are installed.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use bytes::BytesMut;
use varve_fuzz_targets::redo::{Seed, Series};
use varve_postgres::control::Parameters;
use varve_postgres::lsn::WAL_PAGE_SIZE;
use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Major, Oid, Page, RelFork, RelNode, page};
use varve_protocol::wire::{StartupPacket, backend};
use varve_protocol::{Answer, Header, Query, Request, Response};
use varve_redo::change::{BlockRecord, Change};
use varve_redo::visibility_map::visibility_map_clears;
use varve_testbed::redo;
use varve_verify::wal::{Next, WalSource as _};
use varve_verify::{DataDirectory, WalDirectory};

/// Largest input that is kept.
const SEED_SIZE_MAX: usize = 6000;
/// The same of a series, whose pages are full.
const SERIES_SIZE_MAX: usize = 12_000;
/// Prunes with which a series is worth keeping.
const SERIES_PRUNES: std::ops::RangeInclusive<usize> = 2..=5;
/// Pages of WAL in a seed of `wal_stream`.
const STREAM_PAGES: u64 = 2;

/// Inputs that are looked at for each thing to show, in each SQL file.
const CANDIDATES_MAX: u32 = 100;

/// The smallest inputs, by target and what they show.
#[derive(Default)]
struct Seeds {
    inputs: BTreeMap<(&'static str, String), Vec<u8>>,
    candidates: HashMap<(&'static str, String), u32>,
}

impl Seeds {
    fn offer(&mut self, target: &'static str, shows: String, input: impl FnOnce() -> Vec<u8>) {
        let candidates = self.candidates.entry((target, shows.clone())).or_default();
        *candidates += 1;
        if *candidates > CANDIDATES_MAX {
            return;
        }
        let input = input();
        let is_small = match target {
            "wal_stream" => true,
            "redo_heap_series" => input.len() <= SERIES_SIZE_MAX,
            _ => input.len() <= SEED_SIZE_MAX,
        };
        if !is_small {
            return;
        }
        let known = self.inputs.entry((target, shows)).or_insert_with(|| input.clone());
        if input.len() < known.len() {
            *known = input;
        }
    }
}

fn redo_target(rmid: u8) -> Option<&'static str> {
    Some(match rmid {
        rmgr::XLOG => "redo_xlog",
        rmgr::HEAP => "redo_heap",
        rmgr::HEAP2 => "redo_heap2",
        rmgr::BTREE => "redo_btree",
        rmgr::HASH => "redo_hash",
        rmgr::GIN => "redo_gin",
        rmgr::GIST => "redo_gist",
        rmgr::SPGIST => "redo_spgist",
        rmgr::BRIN => "redo_brin",
        rmgr::SEQ | rmgr::GENERIC => "redo_sequence_and_generic",
        _ => return None,
    })
}

fn main() -> Result<()> {
    let mut majors: Vec<Major> = std::env::args().skip(1).filter_map(|arg| Major::from_number(arg.parse().ok()?)).collect();
    if majors.is_empty() {
        majors = Major::ALL.into_iter().filter(|major| varve_testbed::postgres::bin_dir(*major).is_ok()).collect();
    }
    let mut seeds = Seeds::default();
    messages(&mut seeds);
    for major in majors {
        println!("{major:?}");
        let mut files: Vec<PathBuf> = std::fs::read_dir(redo::sql_path("x").parent().context("a folder")?)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()?;
        files.sort();
        for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "sql")) {
            if let Err(error) = from_sql(major, file, &mut seeds) {
                println!("{} gives no seeds: {error:#}", file.display());
            }
        }
    }
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    for ((target, shows), input) in &seeds.inputs {
        let folder = corpora.join(target);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(shows), input)?;
    }
    println!("{} inputs, {} bytes", seeds.inputs.len(), seeds.inputs.values().map(Vec::len).sum::<usize>());
    Ok(())
}

/// Runs a SQL file and takes seeds from its WAL, whose records carry the pages that they leave.
fn from_sql(major: Major, file: &Path, seeds: &mut Seeds) -> Result<()> {
    seeds.candidates.clear();
    let sql = std::fs::read_to_string(file)?;
    let compression = ["lz4", "zstd", "pglz"].into_iter().find(|kind| sql.contains(&format!("wal_compression = {kind}")));
    let settings = compression.map(|kind| ("wal_compression", if major == Major::V14 { "on" } else { kind }));
    let mut postgres = redo::init(major, &[], settings.as_slice())?;
    postgres.start()?;
    let ran = postgres.psql_file("postgres", file);
    postgres.stop("fast")?;
    ran.map(drop).or_else(|error| if postgres.wal_segments()?.is_empty() { Err(error) } else { Ok(()) })?;
    let control = std::fs::read(postgres.data_dir().join("global/pg_control"))?;
    let index = major_byte(major);
    let used = control.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    seeds.offer("control_file", format!("pg{major}"), || [&[index, 1], &control[..used]].concat());
    let directory = DataDirectory::open(&postgres.data_dir())?;
    let mut wal = WalDirectory::open(&postgres.data_dir())?;
    let mut pages: HashMap<(RelFork, BlockNumber), Box<Page>> = HashMap::new();
    let mut series: HashMap<(RelFork, BlockNumber), (Series, usize)> = HashMap::new();
    while let Next::Record(framed) = wal.next()? {
        let record = Record::decode(&framed.bytes, framed.start, framed.end, major)?;
        let shows = format!("{}_{:02x}", family(major, record.header.rmid), record.kind());
        seeds.offer("wal_record", shows, || [&[index], &framed.bytes[..]].concat());
        heap_series(&record, major, &pages, &mut series, seeds);
        changes(&record, major, &mut pages, seeds);
        if framed.start >= directory.checkpoint() {
            break;
        }
    }
    stream(&postgres.wal_segments()?, major, seeds)
}

/// The resource manager's name, and the major where its records are laid out in a way that other majors do not know.
fn family(major: Major, rmid: u8) -> String {
    let name = rmgr::name(rmid).to_lowercase();
    match (rmid, major) {
        (rmgr::HEAP2, Major::V14 | Major::V15 | Major::V16) => format!("{name}_pg{major}"),
        (rmgr::HASH | rmgr::GIST, Major::V14 | Major::V15) => format!("{name}_before_pg16"),
        _ => name,
    }
}

fn major_byte(major: Major) -> u8 {
    Major::ALL.iter().position(|other| *other == major).unwrap_or_default() as u8
}

fn changes(record: &Record<'_>, major: Major, pages: &mut HashMap<(RelFork, BlockNumber), Box<Page>>, seeds: &mut Seeds) {
    let kind = |what: &str| format!("{what}_{:02x}", record.kind());
    for (rel, blkno, change) in visibility_map_clears(record) {
        let page = pages.get(&(rel, blkno)).cloned().unwrap_or_else(|| Box::new(page::ZERO_PAGE));
        let seed = Seed { major, blkno, change: change.encode().to_vec(), page };
        seeds.offer("redo_maps_and_slru", kind("clear"), || seed.encode());
    }
    for change in [
        Change::ClogStatus { status: 1, xids: vec![800, 803].into() },
        Change::MultiXactOffset { multi: 5, offset: 9 },
        Change::MultiXactMembers { first: 9, members: vec![(800, 1), (801, 4)] },
        Change::CommitTs { time: 700_000_000, origin: 1, xids: vec![800].into() },
        Change::TruncateVisibility { heap_blocks: 3 },
    ] {
        let shows: String = format!("{change:?}").chars().take_while(|c| c.is_alphabetic()).collect();
        let seed = Seed { major, blkno: 0, change: change.encode().to_vec(), page: Box::new(page::ZERO_PAGE) };
        seeds.offer("redo_maps_and_slru", shows.to_lowercase(), || seed.encode());
    }
    for block in &record.blocks {
        let before = pages.remove(&(block.rel, block.blkno)).filter(|_| !block.will_init);
        // A record that is nothing but images says nothing of the page before.
        let new = block.will_init || record.header.rmid == rmgr::XLOG;
        let before = before.or_else(|| new.then(|| Box::new(page::ZERO_PAGE)));
        if let (Some(before), Some(target)) = (before, redo_target(record.header.rmid)) {
            let change = Change::Record(BlockRecord::trim(record, block)).encode();
            if change.len() <= usize::from(u16::MAX) {
                let seed = Seed { major, blkno: block.blkno, change: change.to_vec(), page: before };
                seeds.offer(target, format!("{}_{}", kind(&family(major, record.header.rmid)), block.id.min(3)), || seed.encode());
            }
        }
        let mut after = Box::new(page::ZERO_PAGE);
        if let Some(image) = &block.image
            && image.restore(&mut after).is_ok()
        {
            page::set_lsn(&mut after, record.end);
            pages.insert((block.rel, block.blkno), after);
            let flags = image_flags(image, major);
            let head =
                [&[major_byte(major), flags][..], &image.hole_offset.to_le_bytes(), &image.hole_len.to_le_bytes(), &[record.header.rmid]];
            seeds.offer("image", format!("pg{major}_{:?}", image.compression).to_lowercase(), || [&head.concat(), image.bytes].concat());
        }
    }
}

/// What is done to heap pages one after the other, from a page that is known on.
fn heap_series(
    record: &Record<'_>,
    major: Major,
    pages: &HashMap<(RelFork, BlockNumber), Box<Page>>,
    series: &mut HashMap<(RelFork, BlockNumber), (Series, usize)>,
    seeds: &mut Seeds,
) {
    let is_heap = matches!(record.header.rmid, rmgr::HEAP | rmgr::HEAP2);
    for block in record.blocks.iter().filter(|block| block.rel.fork == Fork::Main) {
        let key = (block.rel, block.blkno);
        if !is_heap || block.will_init || block.image.as_ref().is_some_and(|image| image.apply) {
            series.remove(&key);
            continue;
        }
        let Some(before) = pages.get(&key) else { continue };
        let begun = Series { major, blkno: block.blkno, page: before.clone(), changes: Vec::new() };
        let (series, prunes) = series.entry(key).or_insert((begun, 0));
        series.changes.push(Change::Record(BlockRecord::trim(record, block)).encode().to_vec());
        // The first type of Heap2 that has blocks prunes, in all majors.
        *prunes += usize::from(record.header.rmid == rmgr::HEAP2 && record.kind() & 0x70 == 0x10);
        if SERIES_PRUNES.contains(prunes) && record.kind() & 0x70 != 0x10 {
            seeds.offer("redo_heap_series", format!("pg{major}_{prunes}_prunes"), || series.encode());
        }
    }
}

/// The flags with which an image is written (`bimg_info`).
fn image_flags(image: &varve_postgres::wal::image::Image, major: Major) -> u8 {
    use varve_postgres::wal::image::Compression;
    let hole = u8::from(image.hole_len > 0);
    let (apply, pglz) = if major == Major::V14 { (0x04, 0x02) } else { (0x02, 0x04) };
    let compression = match image.compression {
        Compression::None => 0,
        Compression::Pglz => pglz,
        Compression::Lz4 => 0x08,
        Compression::Zstd => 0x10,
    };
    hole | compression | if image.apply { apply } else { 0 }
}

/// The first pages of a segment, moved to where the target expects them.
fn stream(segments: &[PathBuf], major: Major, seeds: &mut Seeds) -> Result<()> {
    let first = segments.first().context("WAL")?;
    let bytes = std::fs::read(first)?;
    let pages = bytes.get(..(STREAM_PAGES * WAL_PAGE_SIZE) as usize).context("pages of WAL")?;
    seeds.offer("wal_stream", format!("pg{major}_segment"), || [&[major_byte(major), 0, 100, 0], pages].concat());
    Ok(())
}

/// Inputs that need no server.
fn messages(seeds: &mut Seeds) {
    let rel = RelNode { spc: 1663 as Oid, db: 5, rel: 16384 }.fork(Fork::Main);
    let header = Header { request_id: 7, request_lsn: Lsn(0x100_0028), not_modified_since: Lsn(0x100_0000) };
    let queries: [(&str, Query, Answer); 5] = [
        ("exists", Query::Exists(rel), Answer::Exists(true)),
        ("nblocks", Query::Nblocks(rel), Answer::Nblocks(9)),
        ("dbsize", Query::DbSize(5), Answer::DbSize(1 << 20)),
        ("relations", Query::ListRelations { spc: 1663, db: 5 }, Answer::Relations(Vec::new())),
        ("range", Query::PageRange { rel, first: 3, count: 2 }, Answer::Pages(Vec::new().into())),
    ];
    for (shows, query, answer) in queries {
        let request = Request { header, query };
        let mut out = BytesMut::new();
        request.encode(&mut out);
        seeds.offer("page_service", format!("request_{shows}"), || out.to_vec());
        out.clear();
        Response::new(request, answer).encode(&mut out);
        seeds.offer("page_service", format!("response_{shows}"), || out.to_vec());
    }
    seeds.offer("page_service", "command_pagestream".to_owned(), || b"pagestream_v3 acme main".to_vec());
    seeds.offer("page_service", "command_basebackup".to_owned(), || b"basebackup acme main 0/16B3748 --gzip --no-slru".to_vec());
    let mut out = BytesMut::new();
    StartupPacket::startup(&[("user", "varve"), ("replication", "true")]).encode(&mut out);
    seeds.offer("wire", "startup".to_owned(), || out.to_vec());
    out.clear();
    backend::copy_data(&mut out, |out| out.extend_from_slice(b"k\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\x01"));
    seeds.offer("wire", "keepalive".to_owned(), || out.to_vec());
    seeds.offer("layer", "three_versions".to_owned(), layer_input);
    seeds.offer("base_backup", "a_database".to_owned(), backup_input);
}

/// Three versions of two blocks, undamaged, and one damage.
fn layer_input() -> Vec<u8> {
    let mut input = vec![1, 1, 200, 0, 8];
    for (block, lsn, kind, value) in [(1u8, 5u16, 1u8, "an image"), (1, 9, 3, "a change"), (2, 5, 0, "")] {
        input.push(block);
        input.extend_from_slice(&lsn.to_le_bytes());
        input.push(kind);
        input.extend_from_slice(&(value.len() as u16).to_le_bytes());
        input.extend_from_slice(value.as_bytes());
    }
    input
}

/// Checkpoint fields, a database with its map, a relation.
fn backup_input() -> Vec<u8> {
    use varve_storage::checkpoint_fields::CheckpointFields;
    use varve_storage::database::DatabaseEntry;
    use varve_storage::relation_size::RelationSize;
    let mut input = vec![1, 3];
    let database = DatabaseEntry { exists: true, floor: Lsn(0) };
    let fields = CheckpointFields {
        next_xid: 800,
        next_oid: 24_576,
        next_multi: 1,
        next_multi_offset: 0,
        oldest_xid: 717,
        oldest_xid_db: 1,
        oldest_multi: 1,
        oldest_multi_db: 1,
        oldest_commit_ts_xid: 0,
        newest_commit_ts_xid: 0,
        full_page_writes: true,
        parameters: Parameters::default(),
    };
    let mut size = RelationSize::default();
    size.extend(2);
    let values = [
        (0u8, 0u32, 0u32, fields.encode().to_vec()),
        (1, 1663, 5, database.encode().to_vec()),
        (2, 1663, 5, vec![7; 512]),
        (6, 1663, 16384, size.encode().to_vec()),
    ];
    for (kind, a, b, value) in values {
        input.push(kind);
        input.extend_from_slice(&a.to_le_bytes());
        input.extend_from_slice(&b.to_le_bytes());
        input.extend_from_slice(&(value.len() as u16).to_le_bytes());
        input.extend_from_slice(&value);
    }
    input
}
