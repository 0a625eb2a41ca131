//! The guard: a process that only holds the key and starts the worker again when it dies.
