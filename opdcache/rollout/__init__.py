"""The rollout stage: completions of the current policy, with its log-probs, as Parquet shards."""
