//! What the house rules say of every file and a machine can see: durable names stand in `docs/storage.md`, a file says
//! what it is and stays short, prose is wrapped, and no test file is left out of its binary.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

/// Lines of a file in `crates/*/src`: a longer one holds more than one thing.
const SOURCE_LINES_MAX: usize = 700;
/// Columns of a line of prose, with its indentation and its comment marker.
const PROSE_COLUMNS_MAX: usize = 120;
/// Where Rust is, ours alone.
const RUST_FOLDERS: [&str; 4] = ["benches", "crates", "fuzz/fuzz_targets", "tests"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Adds all files beneath a folder with this extension.
fn find(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            find(&path, extension, found)?;
        } else if path.extension().is_some_and(|it| it == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(())
}

/// Every Rust file of the repository: its path from the root, and its text.
fn rust_files() -> anyhow::Result<Vec<(String, String)>> {
    let root = root();
    let mut found = Vec::new();
    for folder in RUST_FOLDERS {
        find(&root.join(folder), "rs", &mut found)?;
    }
    ensure!(found.len() > 300, "only {} Rust files were found, this test looks in the wrong place", found.len());
    found.iter().map(|path| Ok((path.strip_prefix(&root)?.display().to_string(), fs::read_to_string(path)?))).collect()
}

fn is_source(path: &str) -> bool {
    path.starts_with("crates/") && path.split('/').nth(2) == Some("src")
}

/// The program's own text: without files of unit tests, without unit tests at the end, without comments.
fn program(path: &str, text: &str) -> Option<String> {
    let for_tests = ["tests.rs", "_tests.rs"].iter().any(|end| path.ends_with(end)) || path.contains("/tests/");
    let for_tests =
        for_tests || ["testing", "testbed", "simulation", "fuzz-targets"].iter().any(|name| path.split('/').nth(1) == Some(name));
    if !is_source(path) || for_tests {
        return None;
    }
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    Some(text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n"))
}

/// All that stands between `before` and `after`, on one line.
fn between<'a>(text: &'a str, before: &'a str, after: char) -> impl Iterator<Item = &'a str> {
    text.match_indices(before).filter_map(move |(at, _)| {
        let rest = &text[at + before.len()..];
        let end = rest.find([after, '\n'])?;
        rest[end..].starts_with(after).then_some(&rest[..end])
    })
}

fn none_of(what: &str, found: &[String]) -> anyhow::Result<()> {
    ensure!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
    Ok(())
}

#[test]
fn every_magic_stands_in_storage_md() -> anyhow::Result<()> {
    let docs = fs::read_to_string(root().join("docs/storage.md"))?;
    let mut magics = BTreeSet::new();
    for (path, text) in rust_files()? {
        let Some(program) = program(&path, &text) else { continue };
        // `*b"..."` is an array: of four or eight capitals it is a magic.
        let arrays = between(&program, "*b\"", '"').filter(|it| [4, 8].contains(&it.len()));
        magics.extend(arrays.filter(|it| it.bytes().all(|byte| byte.is_ascii_uppercase())).map(|it| (it.to_owned(), path.clone())));
    }
    ensure!(magics.len() >= 10, "only {magics:?} were found, this test does not see how magics are written any more");
    let missing: Vec<_> = magics.iter().filter(|(magic, _)| !docs.contains(&format!("`{magic}`"))).map(|it| format!("{it:?}")).collect();
    none_of("magics that docs/storage.md does not name", &missing)
}

/// Fixed words of an object's name as it stands in the source: `tenants/{id}/layers/{:08x}` has `tenants` and `layers`.
fn fixed_words(name: &str) -> Vec<String> {
    let mut depth = 0_u32;
    let fixed = name.chars().map(|letter| {
        depth = if letter == '{' { depth + 1 } else { depth };
        let kept = if depth > 0 { '/' } else { letter };
        depth = if letter == '}' { depth.saturating_sub(1) } else { depth };
        kept
    });
    let words = fixed.collect::<String>();
    words.split(['/', '-', '.']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[test]
fn every_object_prefix_stands_in_storage_md() -> anyhow::Result<()> {
    let docs = fs::read_to_string(root().join("docs/storage.md"))?;
    let places = docs.split("## What stands where").nth(1).and_then(|rest| rest.split("\n## ").next());
    let places = places.context("docs/storage.md has a chapter 'What stands where'")?;
    // Every second piece between backticks is code.
    let places = places.split('`').skip(1).step_by(2).collect::<Vec<_>>().join("\n");
    let mut words = BTreeSet::new();
    for (path, text) in rust_files()? {
        let Some(program) = program(&path, &text) else { continue };
        if !program.contains("ObjectName") {
            continue;
        }
        // A name begins with a word and a slash, and has no spaces; or it goes on in `.join`.
        let begin = between(&program, "format!(\"", '"').filter(|name| {
            let word = name.split('/').next().filter(|word| word.len() < name.len()).unwrap_or_default();
            !name.contains(' ') && !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase())
        });
        let go_on = between(&program, ".join(&format!(\"", '"');
        words.extend(begin.chain(go_on).flat_map(fixed_words).map(|word| (word, path.clone())));
    }
    ensure!(words.len() >= 8, "only {words:?} were found, this test does not see how names of objects are made any more");
    let missing: Vec<_> = words.iter().filter(|(word, _)| !places.contains(word.as_str())).map(|it| format!("{it:?}")).collect();
    none_of("words in names of objects that docs/storage.md, 'What stands where', does not have", &missing)
}

#[test]
fn every_file_says_what_it_is() -> anyhow::Result<()> {
    let silent = rust_files()?.into_iter().filter(|(_, text)| {
        let mut lines = text.lines().skip_while(|line| line.is_empty() || line.starts_with("#!["));
        !lines.next().is_some_and(|line| line.starts_with("//! "))
    });
    none_of("files that do not begin with `//! ` and what they are", &silent.map(|(path, _)| path).collect::<Vec<_>>())
}

#[test]
fn no_source_file_is_too_long() -> anyhow::Result<()> {
    let lengths = rust_files()?.into_iter().filter(|(path, _)| is_source(path)).map(|(path, text)| (path, text.lines().count()));
    let long = lengths.filter(|(_, lines)| *lines > SOURCE_LINES_MAX).map(|(path, lines)| format!("{path}: {lines} lines"));
    none_of(&format!("files of more than {SOURCE_LINES_MAX} lines, which ask for a second room"), &long.collect::<Vec<_>>())
}

/// The prose of a line of Rust: a comment's text, or, behind code, whether there is one.
fn comment(line: &str) -> Option<&str> {
    let code_ends = [";", ",", "{", "}", "(", ")"].map(|end| format!("{end} // "));
    let alone = line.trim_start().strip_prefix("//").map(|text| text.trim_start_matches(['/', '!']).trim_start());
    alone.or_else(|| code_ends.iter().any(|end| line.contains(end)).then_some(line))
}

/// Lines of prose that are too long. Code blocks and tables are no prose.
fn too_long(path: &str, text: &str) -> Vec<String> {
    let mut is_code = false;
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let Some(prose) = (if path.ends_with(".md") { Some(line.trim_start()) } else { comment(line) }) else {
            is_code = false;
            continue;
        };
        if prose.starts_with("```") {
            is_code = !is_code;
        } else if !is_code && !prose.starts_with('|') && line.chars().count() > PROSE_COLUMNS_MAX {
            found.push(format!("{path}:{}", number + 1));
        }
    }
    found
}

#[test]
fn prose_is_wrapped() -> anyhow::Result<()> {
    let root = root();
    let mut pages = Vec::new();
    find(&root.join("docs"), "md", &mut pages)?;
    for entry in fs::read_dir(&root)? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "md") {
            pages.push(path);
        }
    }
    ensure!(pages.len() > 5, "only {pages:?} were found, this test looks in the wrong place");
    let pages = pages.iter().map(|path| Ok((path.strip_prefix(&root)?.display().to_string(), fs::read_to_string(path)?)));
    let files = pages.collect::<anyhow::Result<Vec<_>>>()?.into_iter().chain(rust_files()?);
    let long: Vec<_> = files.flat_map(|(path, text)| too_long(&path, &text)).collect();
    none_of(&format!("prose of more than {PROSE_COLUMNS_MAX} columns, which scripts/rewrap wraps"), &long)
}

#[test]
fn every_test_file_is_part_of_its_binary() -> anyhow::Result<()> {
    let files = rust_files()?;
    let mut forgotten = Vec::new();
    for (main, text) in files.iter().filter(|(path, _)| *path == "tests/main.rs" || path.ends_with("/tests/it/main.rs")) {
        let folder = main.trim_end_matches("main.rs");
        for (path, _) in files.iter().filter(|(path, _)| path.starts_with(folder) && path != main) {
            let name = path[folder.len()..].split('/').next().unwrap_or_default().trim_end_matches(".rs");
            if !text.lines().any(|line| line == format!("mod {name};")) {
                forgotten.push(format!("{path}: {main} lacks `mod {name};`"));
            }
        }
        // One that takes something away from its whole process says so.
        let may_be_alone = |text: &str| text.replace("\n//! ", " ").contains("Alone in its binary: ");
        for (path, text) in files.iter().filter(|(path, _)| folder != "tests/" && path.starts_with(folder.trim_end_matches("it/"))) {
            if may_be_alone(text) {
                continue;
            }
            if !path.starts_with(folder) && path[folder.len() - "it/".len()..].matches('/').count() == 0 {
                forgotten.push(format!("{path}: a binary of its own beside {main}"));
            }
        }
    }
    none_of("test files that no binary has, or that are one alone", &forgotten)
}
