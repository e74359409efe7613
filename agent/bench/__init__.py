"""The comparison of methods on a stream: runs, data, tables and charts."""
