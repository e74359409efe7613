"""Carries results out: releases, metrics, HTTP; knows nothing of the stream client or the methods."""
