//! What is the same for all timelines of a cluster, whatever their history: what `initdb` fixed.

use serde::{Deserialize, Serialize};
use varve_postgres::Major;
use varve_postgres::control::{CompiledSizes, ControlFile};

/// See the module's doc. Clusters have the sizes of Postgres's default build options; others are refused when they are
/// taken in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterFacts {
    /// Major of the server.
    #[serde(with = "major_number", rename = "pg_version")]
    pub major: Major,
    /// `catalog_version_no`: the format of the catalogs.
    pub catalog_version: u32,
    /// Version of the pages' checksums, 0 where they are off.
    pub data_checksum_version: u32,
    /// Whether `char` is signed where the cluster was made (18).
    pub default_char_signedness: bool,
}

impl ClusterFacts {
    /// The facts in a control file.
    ///
    /// # Errors
    /// What is not supported, in words.
    pub fn of_control(control: &ControlFile) -> Result<ClusterFacts, String> {
        let expected = CompiledSizes::default();
        if control.sizes != expected {
            return Err(format!(
                "the cluster was made by a server that was built with other sizes than Postgres's defaults: {:?}, expected {expected:?}",
                control.sizes
            ));
        }
        Ok(ClusterFacts {
            major: control.major,
            catalog_version: control.catalog_version,
            data_checksum_version: control.data_checksum_version,
            default_char_signedness: control.default_char_signedness,
        })
    }
}

mod major_number {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use varve_postgres::Major;

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(major: &Major, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(major.number())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Major, D::Error> {
        let number = u32::deserialize(deserializer)?;
        Major::from_number(number).ok_or_else(|| D::Error::custom(format!("PostgreSQL {number} is not supported: 14 to 18 are")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_round_trip_as_json() {
        let facts =
            ClusterFacts { major: Major::V15, catalog_version: 202_209_061, data_checksum_version: 0, default_char_signedness: true };
        let json = serde_json::to_string(&facts).unwrap();
        assert!(json.contains("\"pg_version\":15"), "{json}");
        assert_eq!(serde_json::from_str::<ClusterFacts>(&json).unwrap(), facts);
        assert!(serde_json::from_str::<ClusterFacts>(&json.replace("15", "13")).is_err());
    }
}
