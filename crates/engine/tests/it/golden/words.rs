//! What a transcript calls things: positions by their distance from the template's end, ids by the order in which they
//! appear.

use varve_postgres::Lsn;
use varve_simulation::wal::START;

/// The names that were given out.
#[derive(Debug, Default)]
pub(super) struct Words {
    timelines: Vec<String>,
    others: Vec<(String, String)>,
}

impl Words {
    /// An id that is no timeline's is called `name` from now on, or, where another one is called so, the next `name`.
    pub(super) fn call(&mut self, id: &impl ToString, name: &str) {
        let id = id.to_string();
        if self.others.iter().any(|(known, _)| *known == id) {
            return;
        }
        let namesakes = self.others.iter().filter(|(_, other)| other.starts_with(name)).count();
        let name = if namesakes == 0 { name.to_owned() } else { format!("{name} (disk {})", namesakes + 1) };
        self.others.push((id, name));
    }

    /// `text` with all positions and ids replaced.
    pub(super) fn tell(&mut self, text: &str) -> String {
        let is_of_token = |c: char| c.is_ascii_alphanumeric() || c == '/';
        let mut told = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let is_token = is_of_token(first);
            let end = rest.find(|c| is_of_token(c) != is_token).unwrap_or(rest.len());
            let (now, later) = rest.split_at(end);
            if is_token {
                told.push_str(&self.token(now));
            } else {
                told.push_str(now);
            }
            rest = later;
        }
        told
    }

    fn token(&mut self, token: &str) -> String {
        match token.parse::<Lsn>() {
            Ok(lsn) if lsn >= START => format!("+{}", lsn.distance_from(START)),
            Ok(lsn) => lsn.to_string(),
            Err(_) => token.split('/').map(|part| self.id(part)).collect::<Vec<_>>().join("/"),
        }
    }

    fn id(&mut self, part: &str) -> String {
        if part.len() != 32 || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return part.to_owned();
        }
        if let Some((_, name)) = self.others.iter().find(|(id, _)| id == part) {
            return name.clone();
        }
        let known = self.timelines.iter().position(|id| id == part);
        let at = known.unwrap_or_else(|| {
            self.timelines.push(part.to_owned());
            self.timelines.len() - 1
        });
        format!("t{}", at + 1)
    }
}

#[test]
fn positions_and_ids_get_short_names() {
    let mut words = Words::default();
    let (first, second) = ("0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210");
    words.call(&second, "acme");
    assert_eq!(words.tell(&format!("{second}/{first}: {}, 0/10", START + 104)), "acme/t1: +104, 0/10");
    assert_eq!(words.tell(&first.replace('0', "1")), "t2");
}
