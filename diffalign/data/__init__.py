"""Preference data: records and their readers, safe image preparation, the cache of latents and embeddings."""
