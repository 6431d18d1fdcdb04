//! Redo of heap records, sequences, generic WAL and what goes with them against Postgres.

varve_testbed::redo_tests!(
    heap_basic,
    heap_freeze,
    heap_locks,
    heap_rows,
    heap_speculative,
    heap_vacuum,
    heap_visibility,
    checksums,
    free_space,
    generic,
    images_lz4,
    images_pglz,
    images_zstd,
    sequences,
    server,
    storage,
    storage_file_copy,
    transactions,
);

varve_testbed::redo_tests!(recovery: free_space, heap_basic, heap_freeze, heap_locks, heap_rows, heap_vacuum, heap_visibility);
