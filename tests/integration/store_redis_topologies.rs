//! Sentinel and Cluster.
