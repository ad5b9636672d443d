"""The train stage: a DeepSpeed learner on cached teacher log-probs."""
