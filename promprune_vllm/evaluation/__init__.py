"""What pruning costs in answers: asks a running server questions about generated scenes, over HTTP alone."""
