"""What the actor and the learner must agree on: configuration, wire formats, queue, weights, HTTP."""
