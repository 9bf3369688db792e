"""The latent dataset: ordinary WebDataset tars, a geometry index beside each, Parquet columns, a manifest.

    DEST/manifest.json                    points to the newest generation; the commit
         generations/HASH.json, .parquet  immutable: the manifest proper and its table of shards
         latents/NAME.tar, .index.parquet fp16 .npy members; where each lies in the file
         columns/NAME.parquet             id, key, label, caption, original size: replaceable
         receipts/NAME.json               the commit of one shard: accounting, hashes, statistics, quarantine
         autoencoder/                     the frozen first stage that made the latents (a diffusers folder)

NAME is the name of the input shard.
"""
