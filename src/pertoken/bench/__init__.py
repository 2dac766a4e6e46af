"""The room of benchmarks: questions, exact grading, and what the grades depend on."""
