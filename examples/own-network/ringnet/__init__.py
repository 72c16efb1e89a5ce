"""Points on rings: a network, a sampler, a data source, a scorer and a metric for scoreray."""
