"""The paper's claims on stale data: the real learner against a sampler of exactly known staleness."""
