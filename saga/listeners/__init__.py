"""What can be told of a saga's events: the log, stageflow's event sink, OpenTelemetry. Each is a listener that a coordinator is given."""
