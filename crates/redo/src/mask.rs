//! What Postgres masks before it compares a redone page with the primary's (`access/bufmask.c` and each resource manager's `rm_mask`).
