"""The CLIP that is updated: its towers, adapters, images and modality gap."""
