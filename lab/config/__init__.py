"""The settings of an experiment: schema, records, checks, loading, documents."""
