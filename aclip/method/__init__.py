"""What a paper changes: losses, masks, schedules, captions. It knows neither recipes nor towers."""
