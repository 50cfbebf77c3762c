"""What a run can train of a system, a file a kind: `train: {kind: ...}`."""
