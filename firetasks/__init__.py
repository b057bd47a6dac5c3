"""The firetasks: thin adapters from a FireWorks spec to the library."""
