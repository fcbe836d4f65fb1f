"""Writes every suite into the package."""

from __future__ import annotations

from bench.shipped.suites import write_all

if __name__ == "__main__":
    write_all()
