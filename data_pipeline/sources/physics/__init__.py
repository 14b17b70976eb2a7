"""slotstream-physics: a benchmark of simulated clips that anyone makes without a download. See card.md beside this file."""

from data_pipeline.sources.physics.video import SPLITS, VERSION, PhysicsClip, PhysicsVideos, render_clip

__all__ = ["SPLITS", "VERSION", "PhysicsClip", "PhysicsVideos", "render_clip"]
