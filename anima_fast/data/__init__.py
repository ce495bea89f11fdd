"""From folders of images and captions to batches: configuration, buckets, captions, caches."""
