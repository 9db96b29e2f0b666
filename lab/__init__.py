"""What you run to study the method: experiments, looks inside, reports, benchmarks, memory."""
