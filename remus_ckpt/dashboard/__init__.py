"""The live page: what `status` and the metrics say, drawn, from the process that knows it or through a backup."""
