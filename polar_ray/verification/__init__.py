"""Is a deployment right? Rewards that somebody has published, and float32 rewards of the same weights, beside ours."""
