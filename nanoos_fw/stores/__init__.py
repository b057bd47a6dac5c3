"""MongoDB stores: the only place that knows collections and indexes."""
