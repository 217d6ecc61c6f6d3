"""From structures to graphs: neighbour lists and batches; knows no model."""
