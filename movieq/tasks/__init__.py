"""What a task is: its states, parameters, records, results and the shapes that clients see."""
