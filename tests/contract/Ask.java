import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

/** Submits a task and asks for the health, twice, with the client's own defaults; prints each status. */
public class Ask {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (int i = 0; i < 2; i++) {
            HttpRequest submit = HttpRequest.newBuilder(URI.create(args[0] + "/api/v1/tasks/submit"))
                    .header("X-API-Key", args[1])
                    .header("Content-Type", "application/json")
                    .POST(BodyPublishers.ofString(args[2]))
                    .build();
            HttpRequest health = HttpRequest.newBuilder(URI.create(args[0] + "/health")).build();
            for (HttpRequest request : new HttpRequest[] {submit, health}) {
                System.out.println(client.send(request, BodyHandlers.ofString()).statusCode());
            }
        }
    }
}
