"""Everything that imports the Kafka client."""
