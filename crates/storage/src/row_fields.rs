//! How fields of durable rows are written: for people as text, in rows as the number or bytes that they are.

/// An LSN: `0/16B3748`, or a number. For `#[serde(with = "row_fields::lsn")]`.
pub(crate) mod lsn {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use varve_postgres::Lsn;

    pub(crate) fn serialize<S: Serializer>(lsn: &Lsn, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(lsn) } else { serializer.serialize_u64(lsn.0) }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Lsn, D::Error> {
        if deserializer.is_human_readable() {
            return String::deserialize(deserializer)?.parse().map_err(de::Error::custom);
        }
        u64::deserialize(deserializer).map(Lsn)
    }
}

/// Several of them. For `#[serde(with = "row_fields::lsns")]`.
pub(crate) mod lsns {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use varve_postgres::Lsn;

    #[derive(Serialize, Deserialize)]
    struct Row(#[serde(with = "super::lsn")] Lsn);

    pub(crate) fn serialize<S: Serializer>(lsns: &[Lsn], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(lsns.iter().map(|lsn| Row(*lsn)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Lsn>, D::Error> {
        let rows = Vec::<Row>::deserialize(deserializer)?;
        Ok(rows.into_iter().map(|Row(lsn)| lsn).collect())
    }
}

/// A key: 36 hexadecimal digits, or its 18 bytes. For `#[serde(with = "row_fields::key")]`.
pub(crate) mod key {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    use crate::key::{KEY_SIZE, Key};

    pub(crate) fn serialize<S: Serializer>(key: &Key, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return key.0.serialize(serializer);
        }
        let digits: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&digits)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Key, D::Error> {
        if !deserializer.is_human_readable() {
            return <[u8; KEY_SIZE]>::deserialize(deserializer).map(Key);
        }
        let text = String::deserialize(deserializer)?;
        let mut key = Key([0; KEY_SIZE]);
        let digits = text.len() == 2 * KEY_SIZE && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        for (at, byte) in key.0.iter_mut().enumerate().filter(|_| digits) {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(de::Error::custom)?;
        }
        if digits { Ok(key) } else { Err(de::Error::custom(format!("expected {} hexadecimal digits", 2 * KEY_SIZE))) }
    }
}
