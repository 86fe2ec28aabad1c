"""Why a drafter loses acceptance: what files say, what short runs show, what engines demand."""
