"""What a kind of run is."""

LATENTS, REJECTS, RECONSTRUCTIONS, IMAGES, SWEPT = "latents", "rejects", "reconstructions", "images", "sweep"

FOLDERS = {  # by job: where its shards are
    "encode": LATENTS,
    "reconstruct": RECONSTRUCTIONS,
    "sweep": SWEPT,
    "generate": IMAGES,
    "regenerate": IMAGES,
    "interpolate": IMAGES,
}
