"""The live page draws what `status` and the metrics say, from the process that knows it or through a backup."""
